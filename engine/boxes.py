"""Where on image_clue_0 a figure comes from, read from the code that showed it.

What a reader may rely on: a box is given only where it can be told. Code crops the picture by plain
numbers, as in `image_clue_0.crop((40, 20, 90, 60))`, also by way of variables. It does so as often
as it shows figures, and each figure has the proportions of its crop, or the crop is what imshow
draws. Code is only parsed here, never run; it may be anything.
"""

import ast
import math
import warnings

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


def crops(code: str | None, figures: list, size: tuple | None = None) -> list[Box | None]:
    """For each figure of a call its box, or None where unknown. size: of the picture, if known."""
    reader = Reader()
    try:
        with warnings.catch_warnings():  # Python has some to say about odd code
            warnings.simplefilter("ignore")
            reader.visit(ast.parse(code or ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # what it read so far stands
    boxes = reader.drawn or reader.cropped
    if len(boxes) != len(figures):
        return [None] * len(figures)
    if reader.drawn:
        return boxes
    pairs = zip(boxes, figures, strict=True)
    return [box if box and fits(box, figure.size, size) else None for box, figure in pairs]


class Reader(ast.NodeVisitor):
    """Walks through code in the order in which it runs, and notes what it crops and draws."""

    def __init__(self):
        self.values = {}  # what each variable was last given
        self.cropped = []  # a box for each crop
        self.drawn = []  # and for each imshow

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):  # by a loop or the like: it may be anything
            self.values[node.id] = None

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            self.values[getattr(target, "id", None)] = self.value(node.value)

    def visit_Call(self, node):
        self.generic_visit(node)
        if self.is_crop(node):
            self.cropped.append(self.box(node))
        if getattr(node.func, "attr", "") == "imshow":
            parts = [self.value(part) for part in ast.walk(node)]
            boxes = [self.box(part) for part in parts if self.is_crop(part)]
            self.drawn.append(boxes[0] if boxes else None)

    def value(self, node):
        """What a variable was last given, or the expression itself."""
        return self.values.get(node.id, node) if isinstance(node, ast.Name) else node

    def is_crop(self, node) -> bool:
        function = getattr(node, "func", None)
        if getattr(function, "attr", "") != "crop" or not node.args:
            return False
        return getattr(self.value(function.value), "id", "") == "image_clue_0"

    def box(self, crop: ast.Call) -> Box | None:
        """The numbers that code crops by; None where they are computed, or no box."""
        try:
            left, upper, right, lower = map(float, ast.literal_eval(self.value(crop.args[0])))
        except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
            return None
        wide = -math.inf < left < right < math.inf
        high = -math.inf < upper < lower < math.inf
        return (left, upper, right, lower) if wide and high else None


def fits(box: Box, figure: tuple, picture: tuple | None) -> bool:
    """Has a figure's size the proportions of the box, to five parts in a hundred?

    One of the picture's own size shows the picture, and not a part of it.
    """
    width = box[2] - box[0]
    height = box[3] - box[1]
    if figure == picture != (width, height):
        return False
    return abs(width * figure[1] - height * figure[0]) < 0.05 * width * figure[1]
