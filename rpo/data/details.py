"""The optional columns that say how a pair came to be: kept and handed on, and nothing is trained on them."""

CURATION_COLUMNS = (
    "record",
    "chosen_is",
    "rejected_is",
    "instructor_model",
    "critic_prompt_sha256",
    "instructor_prompt_sha256",
    "editor_licence",
    "scores",
    "distance",
)
"""What `rpo curate` says besides: id of the record; whether a side is a source or an edit; who wrote the instruction;
the prompt templates; what binds edits; every reward's scores as JSON; mean absolute difference of source and edit."""

DETAIL_COLUMNS = (
    "prompt_id",
    "critique",
    "edit_instruction",
    "generator_model",
    "editor_model",
    "critic_model",
    "label_source",
    "source_row",
    *CURATION_COLUMNS,
)
"""All of them, in the order in which they are written."""

NUMBERS = {"source_row": int, "distance": float}
"""Those that are numbers where a column has one type; the others are text."""
