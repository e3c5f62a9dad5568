"""Where on a picture a figure comes from, read from the code that showed it.

What a reader may rely on: a box is given only where it can be told. The code must crop a picture of
the prompt by plain numbers, as in `image_clue_0.crop((40, 20, 90, 60))`, also by way of variables.
The figure must have the size of that crop, or its proportions where the code resizes, or be a plot
in which the crop is drawn. Code is only parsed here, never run.
"""

import ast
import re

CLUE = re.compile(r"image_clue_(\d+)")


def boxes(t) -> list[list]:
    """For each turn of a trajectory, for each figure: [picture, left, top, right, bottom] or None.

    picture: its number among the prompt's. The sides are fractions of its width and height.
    """
    reader = Reader(t.images[: len(t.sample.images)])
    return [reader.boxes(turn) for turn in t.turns]


class Reader(ast.NodeVisitor):
    """Reads the code of a trajectory, turn by turn, since variables live on."""

    def __init__(self, pictures: list):
        self.pictures = pictures
        self.names = {}  # what each variable was last given
        self.crops = []  # the crops of a turn, each (box, (width, height) in pixels)
        self.plots = []  # those that are drawn by imshow

    def boxes(self, turn) -> list:
        """The box of each figure that a turn showed."""
        self.crops = []
        self.plots = []
        try:
            self.visit(ast.parse(turn.code or ""))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass  # what was read so far stands
        if len(self.plots) == len(turn.images):
            return [box for box, _ in self.plots]
        resized = "resize" in turn.code
        found = []
        for figure in turn.images:
            fitting = [crop for crop in self.crops if fits(figure.size, crop[1], resized)]
            found.append(fitting[0][0] if fitting else None)
            if fitting:
                self.crops.remove(fitting[0])  # two figures of one size are two crops
        return found

    def visit_Assign(self, node):
        self.generic_visit(node)
        self.names[ast.unparse(node.targets[0])] = self.value(node.value)

    def visit_Call(self, node):
        self.generic_visit(node)
        crop = self.crop(node)
        if crop:
            self.crops.append(crop)
        if getattr(node.func, "attr", "") == "imshow" and node.args:
            drawn = self.crop(self.value(node.args[0]))
            self.plots += [drawn] if drawn else []

    def value(self, node):
        """What a variable was last given, or the expression itself."""
        return self.names.get(getattr(node, "id", None), node)

    def crop(self, node):
        """(box, size) of a crop by plain numbers; None for all else."""
        try:
            clue = CLUE.fullmatch(self.value(node.func.value).id)
            sides = ast.literal_eval(self.value(node.args[0]))
            left, top, right, bottom = [round(side) for side in sides]
            picture = int(clue[1])
            width, height = self.pictures[picture].size
        except (AttributeError, TypeError, ValueError, IndexError, OverflowError):
            return None
        if node.func.attr != "crop" or right <= left or bottom <= top:
            return None
        box = [picture, left / width, top / height, right / width, bottom / height]
        return [round(side, 4) for side in box], (right - left, bottom - top)


def fits(figure: tuple, crop: tuple, resized: bool) -> bool:
    """Whether a figure's size is a crop's, or has its proportions, but for whole pixels."""
    difference = figure[0] * crop[1] - figure[1] * crop[0]
    return figure == crop or resized and abs(difference) <= max(crop)
