"""A cache that cannot be written is said to be that, and the source is not blamed."""

import errno
import os

import datasets
import pytest

from rpo.data.tables import open_table


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_without_rights_or_room_is_named(number, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache" / "parquet.lock")

    def refused(*_, **__):
        raise OSError(number, os.strerror(number), cache)

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(ValueError, match="another cache in HF_DATASETS_CACHE") as caught:
        open_table("someone/pairs", split="train", cache_dir=None)
    assert f"{cache} cannot be read or written ({os.strerror(number)})" in str(caught.value)
    assert "correct the source" not in str(caught.value)
