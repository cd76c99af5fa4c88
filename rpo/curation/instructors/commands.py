"""Whether a sentence can be an order to an editor.

Verbs are an open class: a list of allowed ones would refuse "desaturate the sky". What an order does not begin with is
a closed one: articles, pronouns, auxiliaries, question words and negations. So a sentence is refused that begins with
one of these, whose subject is followed by an auxiliary ("the" left out: "dog is missing"), that asks, or that only
forbids. What is left may still be no order ("missing dog"): the score of the edit decides about that, not a grammar.
"""

import re

from rpo.curation.records import Fault, Instructions

_DETERMINERS = {"a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "all", "both"}
_PRONOUNS = {"i", "you", "he", "she", "it", "we", "they", "there", "here", "my", "your", "his", "her", "its", "their"}
_QUESTIONS = {"what", "which", "who", "whose", "where", "when", "why", "how"}
_NUMBERS = {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
_BEING = {"is", "are", "was", "were", "am", "isn't", "aren't", "has", "have", "had", "looks", "seems", "appears"}
_MODALS = {"can", "could", "should", "would", "must", "may", "might", "will", "shall", "needs", "ought"}
_AUXILIARIES = _BEING | _MODALS
_NEGATIONS = {"no", "not", "don't", "never", "without", "avoid", "none", "neither", "nothing"}
_RELATIVES = {"what", "that", "which", "who", "whose", "where"}
_SUBJECT_WORDS = 4  # "red circle left is missing": an auxiliary this early has the words before it as its subject


def check_commands(instructions: Instructions, raw: str = "") -> Instructions | Fault:
    """The instructions as they are, or what is wrong with the first that is no order."""
    for text in instructions.instructions:
        if problem := why_no_command(text):
            message = f"the instruction {text!r} {problem}; expected an order such as 'add a second cat'"
            return Fault("invalid", message, raw=raw or instructions.text)
    return instructions


def why_no_command(text: str) -> str:
    """Why a sentence cannot be an order to an editor; empty if it can be.

    Example:
        >>> why_no_command("desaturate the sky"), why_no_command("the sky is too blue")
        ('', "begins with 'the', so it is no order")
    """
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower().replace("’", "'"))
    if words[:1] == ["please"]:
        words = words[1:]
    if not words:
        return "has no words"
    if text.rstrip().endswith("?"):
        return "is a question"
    if words[0] in _NEGATIONS or words[:2] == ["do", "not"]:
        return "only says what shall not be"
    if words[0].isdigit() or words[0] in _DETERMINERS | _PRONOUNS | _QUESTIONS | _NUMBERS | _AUXILIARIES:
        return f"begins with {words[0]!r}, so it is no order"
    for index, word in enumerate(words[1:_SUBJECT_WORDS], start=1):
        if word in _RELATIVES:
            break
        if word in _AUXILIARIES:
            return f"states something of {' '.join(words[:index])!r}, so it is no order"
    return ""
