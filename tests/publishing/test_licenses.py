"""Which licence a derived model inherits."""

import pytest
from huggingface_hub import ModelCard

from rpo.publishing.licenses import LICENSES, License, license_of_base
from rpo.publishing.publish import CardFacts, write_model_card
from tests.publishing.test_publish import base, folder, trained  # noqa: F401, fixtures


def test_a_folder_tells_its_own(tmp_path):
    assert license_of_base(str(tmp_path)) is None
    header = "---\ntags: [a]\nlicense: other\nlicense_name: 'mine'\nlicense_link: https://example.org/it\n---\n"
    (tmp_path / "README.md").write_text(header + "license: not this\n")
    assert license_of_base(str(tmp_path)) == License("other", "mine", "https://example.org/it")
    (tmp_path / "README.md").write_text("---\nlicense: [cut\n---\n")
    assert license_of_base(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("license: not a header\n")
    assert license_of_base(str(tmp_path)) is None


@pytest.mark.parametrize("known", LICENSES)
def test_a_known_base_hands_its_licence_down(known, folder):  # noqa: F811
    data = ModelCard.load(write_model_card(folder, CardFacts("MaPO", base_model=known))).data
    one = LICENSES[known]
    assert (data.license, data.get("license_name"), data.get("license_link")) == (one.id, one.name, one.link)
    assert (one.id == "other") == (one.link is not None)


def test_what_comes_with_the_package_has_its_licence_and_no_other_expression_has(folder):  # noqa: F811
    written = [
        ModelCard.load(write_model_card(folder, CardFacts("MaPO", base_expression=expression))).data.license
        for expression in ("rpo.shapes.path()", "mine.path()")
    ]
    assert written == ["apache-2.0", None]
