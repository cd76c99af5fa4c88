"""Puts configurations and examples into the wheel, inside the package; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the package."""

    def run(self) -> None:
        """Copy the configurations beside the modules, unless these stay where they are."""
        super().run()
        if not self.editable_mode:
            package, left_out = Path(self.build_lib, "rpo"), shutil.ignore_patterns("__pycache__", "continuous_control")
            for folder in ("configs", "examples"):
                shutil.copytree(folder, package / folder, dirs_exist_ok=True, ignore=left_out)


setup(cmdclass={"build_py": BuildWithConfigs})
