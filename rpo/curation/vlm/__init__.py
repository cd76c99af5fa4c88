"""Vision-language models as critics, instructors and judges.

`chat` says what asking is, `server` and `local` are the two ways of it, `prompts` has the words, `answers` takes the
replies apart and keeps them, and `critic` and `instructor` ask (the judge is in `rpo.curation.judge`).
"""
