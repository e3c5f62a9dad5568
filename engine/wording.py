r"""What a text says: spellings of the same made alike, and the options that an answer names.

A letter in a sentence is a claim only where nothing speaks against it: "not B", "A to D" and
"anything but B" name nothing, "B or C" names two, and "The answer is B. Note that A is a
distractor." names B. Where a sentence is unclear, nobody guesses.
"""

import functools
import re
import unicodedata

TIDY = {  # one way to write what means the same; LaTeX stays LaTeX
    "[−–—‐]": "-",
    "[’‘]": "'",
    r"⁄|÷|\\div(?![a-z])": "/",
    r"(?<=[\w)])\*\*(?=[\w(-])": "^",
    r"\*\*": "",
    r"\\[dt]frac": r"\\frac",
    r"\\frac *(\d)(\d)": r"\\frac{\1}{\2}",
    r"\\(?:left|right|displaystyle)(?![a-z])|\\[!()\[\]]": "",
    r"\\[,;: ]|\\quad": " ",
    r"\{,\}": ",",
    r"(?<!\\)\$([^$]*[^$\\])\$": r"\1",
    r"\\([%$#&_])": r"\1",
    r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed) *\{([^{}]*)\}": r"\1",
    r"\^ *\{? *\\circ *\}?|\\degree|°": " degree ",
    r"×|·|⋅|\\times|\\cdot|(?<=\d) ?x ?(?=10 ?\^)": "*",
    r"(?<=\d)[eE]([+-]?\d\d?)(?![\w.])": r"*10^{\1}",
    r"√|(?<![\\a-z])sqrt(?![a-z])": r"\\sqrt",
    r"\\sqrt *(?:\(([^()]*)\)|(\d+))": r"\\sqrt{\1\2}",
    r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])": r"\\pi ",
    r"(?<![\\a-zA-Z])(sin|cos|tan|ln|log|exp)(?= ?[(\d])": r"\\\1",
    "∞": r"\\infty ",
    r"≤|<=|\\leq": r"\\le ",
    r"≥|>=|\\geq": r"\\ge ",
    r" ?\bper ?cent\b": "%",
    r"\^ *\{(\w)\}": r"^\1",
    r"^ *\{([^{}]*,[^{}]*)\} *$": r"\\{\1\\}",
    r"\s+": " ",
}
WORDS = {  # of what is said in words, what is not said
    r"(?i)^(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my) )?(?:(?:final|correct) )?"
    r"(?:answer|option|choice)(?: is|:) *": "",
    "^(?:答案|选项|选择|应选|故选|选|是|为|:| )+": "",
    r"(?i)^(?:it is|it's) ": "",
    r"(?i)(?<!§)\b(?:the|an?) (?=(?!sin|cos|tan|log|ln|exp)[a-z]{2})": "",
    r"(?<=[a-z]{3})[-_](?=[a-z]{3})": " ",
    r" ?([/=+*^<>]) ?": r"\1",
    r"(?<=\d) ?(?:-|to|~) ?(?=\d)": " to ",
    r"^ *([\"'`“])(.*)[\"'`”] *$": r"\2",
    r"^[\s,;:]+|(?:(?<=[^\W\d]{3})[!?]|[\s.,;:。])+$": "",
    r"(?<!\d),|,(?!\d{3}\b)": ", ",
    r" +": " ",
    r"^\[([^()\[\],]*)\]$|^\(([^()\[\]]*)\)$": r"\1\2",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ-"
MARK = re.compile(
    r"(?:^|(?<=[\s;,?.:。？：]))"
    r"(?:[(（\[【]([A-Za-zＡ-Ｚ])[)）\]】]|([A-ZＡ-Ｚ])[.):、．：）])\s*(?=\S)"
)
END_OF_OPTION = re.compile(r"\n|\W+(?:Please )?[Aa]nswer with")
NO_OPTION = re.compile(  # "panels (a) and (b)", "Is (a) larger than (b)?", "(a) is red. Is (b)?"
    r"^(?:$|[.,;:?!]|and\b|or\b)|\b(?:and|or|with|to|from|than|vs|of|in|is)$|[.!?] .*\?$"
)
LETTER = re.compile(  # a capital by itself, but not the article in "A dog", the pronoun in "I see"
    r"(?<![a-zA-Z0-9_'*^+=<-])[(\[]?([B-HJ-Z]|[AI](?! (?!or\b|and\b|is\b|to\b)[a-z]))"
    r"[)\].:、]*(?![a-zA-Z0-9_'*^+=-])"
    r"|(?:[(\[]|(?i:option|answer|choice) |^)([a-z])(?:[)\].:、]+|$)"
)
FILLER = re.compile(
    r"(?i:\b(?:so|thus|hence|therefore|i|think|believe|choose|pick|select|would|should|must|"
    r"be|say|go|with|it|is|it's|are|the|an|my|final|correct|best|right|answers?|options?|choices?|"
    r"letters?|ones?|both|either|or|and)\b)|\ba(?= \w)|[\s.,;:/&()\[\]\"'!、]|答案|选项?|择|是|为"
)
AGAINST = re.compile(
    r"(?i)\b(?:not|no|nor|neither|never|none|without|except|but|cannot|rather|instead|than|unlike|"
    r"if|unless|whether|wait|actually|sorry|changed?|mistake|wrong|incorrect|false|"
    r"or|other|different|opposite|un(?:sure|likely))\b|n't|\?"
)
MORE = re.compile(rf"{AGAINST.pattern}|\band\b")  # "black and white" is not white
CLAIM = re.compile(r"(?i)(final |最终)?(?:\b(?:answer|choice|option)(?: is|:)|答案[是为:])\s*")
HEAD = re.compile(r"(?<=[.!;。])\s+|,? (?:because|since|as) |\n")


def rewrite(text: str, rules: dict) -> str:
    """The text after all replacements {pattern: what for}, in their order."""
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return text.strip()


@functools.lru_cache(4096)
def tidy(text: str) -> str:
    """The text with typography and LaTeX for the same thing made alike; it stays LaTeX."""
    text = re.sub("([⁰¹²³⁴-⁹⁻]+)", r"^{\1}", text)
    text = re.sub("([¼½¾⅐-⅞])", r" \1", text)
    text = unicodedata.normalize("NFKC", text)  # full-width letters and the like
    return rewrite(rewrite(text, TIDY), TIDY)


@functools.lru_cache(4096)
def words(text: str) -> str:
    """The text for comparing words: without articles, leads and case, but for units and symbols."""
    text = re.sub(r"(?<![\\\d])(?<!\d )\b[^\W\d_]{2,}", lambda word: word[0].lower(), tidy(text))
    return rewrite(rewrite(text, WORDS), WORDS)


def choices(question: str) -> dict[str, str]:
    """The options a question lists: "(A) white", "[A] white", "A. white", "A: white", "A、白".

    {"A": "white", ...} in the order of the letters; {} where it lists none, also where it only
    speaks of "panels (a) and (b)".
    """
    runs = [[]]  # of marks A, B, C ...
    for mark in MARK.finditer(question):
        letter = unicodedata.normalize("NFKC", mark[1] or mark[2]).upper()
        if letter == "A":
            runs.append([])
        if letter == LETTERS[len(runs[-1])]:
            runs[-1].append(mark)
    best = {}
    for run in runs:
        ends = [mark.start() for mark in run[1:]] + [len(question)]
        texts = [question[mark.end() : end] for mark, end in zip(run, ends, strict=False)]
        texts = [END_OF_OPTION.split(text.strip())[0].strip(" ;,") for text in texts]
        spoken_of = any(NO_OPTION.search(text) for text in texts)
        if len(texts) >= max(2, len(best)) and not spoken_of:
            best = dict(zip(LETTERS, texts, strict=False))
    return best


def named(text: str, options: dict[str, str], same) -> set | None:
    """The letters that `text` names; the empty set if none; None if it is unclear.

    `same(text, option)` is True where two texts mean the same. What counts is the last thing that
    is called the answer, or else the beginning; what follows it may only give reasons.
    """
    text = tidy(text)
    claims = list(CLAIM.finditer(text))
    start = claims[-1].end() if claims else 0
    before = HEAD.split(text[:start])[-1]
    if AGAINST.search(before) or LETTER.search(before):
        return None
    if len(claims) > 1 and not claims[-1][1]:
        return None
    letters = _plainly(text[start:], options, same)
    head, *reasons = HEAD.split(text[start:], maxsplit=1)
    if letters is not None or not reasons:
        return letters
    letters = _plainly(head, options, same)
    others = _plainly(reasons[0], options, same)
    if others is None and not AGAINST.search(reasons[0]):
        return letters
    return letters if others in (set(), letters) else None


def _plainly(text, options, same):
    """The letters of a phrase that says nothing else, as `named`."""

    def mark(match):
        letter = (match[1] or match[2]).upper()
        return f" §{letter} " if letter in options else match[0]

    marked = LETTER.sub(mark, text)
    equal = {letter for letter, option in options.items() if option and same(text, option)}
    if equal and not re.fullmatch(r"\W*§.\W*", marked):
        return equal
    phrase = words(marked)
    certain = re.match(r"[(\[]?[A-Z][)\].:、]", text) is not None
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        wording = words(option)
        said = rf"(?<![\w.+/^*=§-]){re.escape(wording)}(?![\w+/^*=-]|[.,]\d)"
        if wording and re.search(said, phrase):
            phrase = re.sub(said, f" §{letter} ", phrase)
            certain = True
    found = set(re.findall("§(.)", phrase))
    rest = FILLER.sub("", re.sub("§.", " ", phrase))
    if found and (not rest or len(found) == 1 and certain and not MORE.search(phrase)):
        return found
    if found or not re.fullmatch(r"[a-z ]{3,}", phrase):
        return None if found else set()
    part = re.compile(rf"\b{phrase}\b")  # such as "left" of "The dog is on the left side"
    holding = [letter for letter, option in options.items() if part.search(words(option))]
    alone = len(holding) == 1 and not AGAINST.search(options[holding[0]])
    return set(holding) if alone else set()
