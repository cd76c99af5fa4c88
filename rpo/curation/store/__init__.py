"""What a run has found out, kept on disk; nothing outside this folder knows that there are files.

`folder` opens a run and claims its settings, `shards` has the records of a stage, `progress` counts and times the work.
"""
