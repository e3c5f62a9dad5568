"""Where in a turn's text its code is.

What a reader may rely on: the text is untrusted and may be anything. A block ends at the first
closing fence with which it is Python, or at the first one if there is none. So a fence within a
string does not cut the code, and code with an error in it is still found and its error shown.
"""

import ast
import re

TAGGED = re.compile(r"(?s)<code>(.*?)</code>")
NAMED_FENCE = re.compile(r"(?i)```(?:python|py)[ \t]*\r?\n")
ANY_FENCE = re.compile(r"(?i)```(?:python|py)?[ \t]*\r?\n")
CLOSING_FENCE = re.compile(r"(?m)^[ \t]*```|```[ \t]*\r?$")
CLOSINGS_TRIED = 20  # ends of one block that are tried, since each is parsed


def find_code(text: str) -> str | None:
    """The code of a turn: the last fenced block within <code> tags, or None.

    Where no tagged block is found, the last fence that says python counts.
    """
    blocks = []
    for inner in TAGGED.findall(text):
        blocks += fenced(inner, ANY_FENCE)
    if not blocks:
        blocks = fenced(text, NAMED_FENCE)
    return blocks[-1].replace("\r\n", "\n") if blocks else None


def fenced(text: str, opening: re.Pattern) -> list[str]:
    """The fenced blocks of a text, in order. A fence within a string does not end its block."""
    blocks = []
    start = opening.search(text)
    while start:
        closings = list(CLOSING_FENCE.finditer(text, start.end()))[:CLOSINGS_TRIED]
        if not closings:
            break
        whole = [end for end in closings if parses(text[start.end() : end.start()])]
        end = (whole or closings)[0]
        blocks.append(text[start.end() : end.start()])
        start = opening.search(text, end.end())
    return blocks


def parses(code: str) -> bool:
    """Is it Python?"""
    try:
        ast.parse(code)
    except Exception:  # of several kinds, for what is no Python
        return False
    return True
