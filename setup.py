"""Puts the folder configs into the wheel, inside the package; all else is in pyproject.toml."""

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
            shutil.copytree("configs", Path(self.build_lib, "rpo", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
