r"""What a text says: spellings of the same made alike, and the options that a question lists.

Spellings are made alike by tables of rules, one a line: a pattern, an arrow, and what takes the
place of what it matches. A ␣ there stands for a space.
"""

import functools
import re
import unicodedata


def table(text: str) -> list[tuple[re.Pattern, str]]:
    """The rules of a table, for `rewrite`."""
    rules = []
    for line in text.strip().splitlines():
        pattern, replacement = re.split(" *→ *", line)
        rules.append((re.compile(pattern), replacement.replace("␣", " ")))
    return rules


BEFORE = table(r"""
(?<![{⁰¹²³⁴-⁹⁻])([⁰¹²³⁴-⁹⁻]+)   → ^{\1}
([¼½¾⅐-⅞])                         → ␣\1
""")
TIDY = table(r"""
[−–—‐]                                          → -
[’‘]                                            → '
⁄|÷|\\div(?![a-z])                              → /
(?<=[\w)])\*\*(?=[\w(-])                        → ^
\*\*                                            →
\\[dt]frac                                      → \\frac
\\frac *(\d)(\d)                                → \\frac{\1}{\2}
\\(?:left|right|displaystyle)(?![a-z])|\\[!()\[\]]   →
\\[,;: ]|\\quad                                 → ␣
\{,\}                                           → ,
(?<!\\)\$([^$]*[^$\\])\$                        → \1
\\([%$#&_])                                     → \1
\\(?:text|textbf|mathrm|mathbf|mbox|boxed) *\{([^{}]*)\}   → \1
\^ *\{? *\\circ *\}?|\\degree|°                 → ␣degree␣
×|·|⋅|\\times|\\cdot|(?<=\d) ?x ?(?=10 ?\^)     → *
(?<=\d)[eE]([+-]?\d\d?)(?![\w.])                → *10^{\1}
√|(?<![\\a-z])sqrt(?![a-z])                     → \\sqrt
\\sqrt *(?:\(([^()]*)\)|(\d+))                  → \\sqrt{\1\2}
π|(?<![\\a-zA-Z])pi(?![a-zA-Z])                 → \\pi␣
(?<![\\a-zA-Z])(sin|cos|tan|ln|log|exp)(?= ?[(\d])   → \\\1
∞                                               → \\infty␣
≤|<=|\\leq                                      → \\le␣
≥|>=|\\geq                                      → \\ge␣
\ ?\bper ?cent\b                                 → %
\^ *\{(\w)\}                                    → ^\1
^ *\{([^{}]*,[^{}]*)\} *$                       → \\{\1\\}
\s+                                             → ␣
""")
WORDS = table(r"""
(?i)^(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final |correct )?answer(?: is|:) *   →
(?i)^(?:the )?(?:final |correct )?(?:option|choice)(?: is|:) *   →
^(?:答案|选项|选择|应选|故选|选|是|为|:| )+       →
(?i)^(?:it is|it's)[ ]   →
(?i)(?<!§)\b(?:the|an?) (?=(?!sin|cos|tan|log|ln|exp)[a-z]{2})   →
(?<=[a-z]{3})[-_](?=[a-z]{3})                   → ␣
\ ?([/=+*^<>]) ?                                 → \1
(?<=\d) ?(?:-|to|~) ?(?=\d)                     → ␣to␣
^ *(["'`“])(.*)["'`”] *$                        → \2
^[\s,;:]+|(?:(?<=[^\W\d]{3})[!?]|[\s.,;:。])+$   →
(?<!\d),|,(?!\d{3}\b)                           → ,␣
\ +                                              → ␣
^\[([^()\[\],]*)\]$|^\(([^()\[\]]*)\)$          → \1\2
""")
AGAINST = re.compile(
    r"(?i)\b(?:not|no|nor|neither|never|none|without|except|but|cannot|rather|instead|than|unlike|"
    r"if|unless|whether|wait|actually|sorry|changed?|mistake|wrong|incorrect|false|"
    r"or|other|different|opposite|un(?:sure|likely))\b|n't|\?"
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ-"
MARK = re.compile(
    r"(?:^|(?<=[\s;,?.:。？：]))([(（\[【])?([A-Za-zＡ-Ｚ])(?(1)[)）\]】]|(?<![a-z])[.):、．：）])\s*(?=\S)"
)
END_OF_OPTION = r"\n|\W+(?:Please )?[Aa]nswer with"
NO_OPTION = re.compile(  # "panels (a) and (b)", "Is (a) larger than (b)?", "(a) is red. Is (b)?"
    r"^(?:$|[.,;:?!]|and\b|or\b)|\b(?:and|or|with|to|from|than|vs|of|in|is)$|[.!?] .*\?$"
)


def rewrite(text: str, rules: list) -> str:
    """The text after all rules, again and again until it stays, but four times at most."""
    for _ in range(4):
        before = text
        for pattern, replacement in rules:
            text = pattern.sub(replacement, text)
        text = text.strip()
        if text == before:
            break
    return text


@functools.lru_cache(4096)
def tidy(text: str) -> str:
    """The text with typography and LaTeX for the same thing made alike; it stays LaTeX."""
    text = unicodedata.normalize("NFKC", rewrite(text, BEFORE))  # full-width letters and the like
    return rewrite(text, TIDY)


@functools.lru_cache(4096)
def words(text: str) -> str:
    """The text for comparing words: without articles, leads and case, but for units and symbols."""
    text = re.sub(r"(?<![\\\d])(?<!\d )\b[^\W\d_]{2,}", lambda word: word[0].lower(), tidy(text))
    return rewrite(text, WORDS)


@functools.lru_cache(4096)
def choices(question: str) -> dict[str, str]:
    """The options a question lists: "(A) white", "[A] white", "A. white", "A: white", "A、白".

    {"A": "white", ...} in the order of the letters; {} where it lists none, also where it only
    speaks of "panels (a) and (b)".
    """
    runs = [[]]  # of marks A, B, C ...
    for mark in MARK.finditer(question):
        letter = tidy(mark[2]).upper()
        if letter == "A":
            runs.append([])
        if letter == LETTERS[len(runs[-1])]:
            runs[-1].append(mark)
    best = {}
    for run in runs:
        ends = [following.start() for following in run[1:]] + [len(question)]
        texts = []
        for mark, end in zip(run, ends, strict=False):
            text = question[mark.end() : end].strip()
            texts.append(re.split(END_OF_OPTION, text)[0].strip(" ;,"))
        if len(texts) >= max(2, len(best)) and not any(map(NO_OPTION.search, texts)):
            best = dict(zip(LETTERS, texts, strict=False))
    return best
