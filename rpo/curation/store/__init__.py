"""Where a run of curation is kept: the only files that know that there are files."""
