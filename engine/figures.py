"""Every way in which code inside a sandbox shows a picture or reads a video.

Models write plt.show(), fig.show(), image.show(), display(x), cv2.imshow(name, array) and more.
All of them end in `Figures.show`, which adds one RGB picture to the reply and binds it as the
next image_clue.

What a reader may rely on:
  - A picture is shown once, whatever the way; code may reload pyplot or choose another backend.
  - Sizes and counts stay below the constants of this file. What is too large is scaled down, with
    room left for the figures that may follow.
  - A matplotlib figure that was shown, or could not be drawn, is closed.
  - A video opens at its first use, and every frame that it decodes is noted. Nothing in here is a
    security boundary: the trainer checks what comes out (sandbox.py).
"""

import io
import math
import mmap
import sys
import types
from importlib.machinery import ModuleSpec

from PIL import Image, ImageShow

from data import rgb

MAX_FIGURES = 32  # of one call
MAX_PIXELS = 2_000_000  # of one figure
MAX_CALL_PIXELS = 16_000_000  # of all figures of one call
KEPT_PIXELS = 250_000  # that every later figure of a call can still have
DECORD_BYTES = 64 << 20  # that decoding itself may take
MAX_ASPECT = 200  # image processors refuse images as thin as this


class Figures:
    """The figures that one call has shown."""

    def __init__(self, namespace: dict):
        import numpy
        from matplotlib import pyplot

        self.namespace = namespace
        self.pyplot = pyplot
        self.begin(0)
        namespace.update(plt=pyplot, np=numpy, Image=Image, display=self.display)
        self._bind()

    def begin(self, next_clue: int):
        """A new call: its first figure becomes image_clue_<next_clue>."""
        self.next_clue = next_clue
        self.sizes = []  # (width, height) of each figure
        self.pixels = []  # RGB bytes of each figure

    def _bind(self):
        """Lead every way to show to these figures."""
        from matplotlib.backend_bases import FigureManagerBase
        from matplotlib.figure import Figure

        show = self.show
        draw = self.draw
        # pyplot.show calls the managers of all figures, also after importlib.reload(plt).
        FigureManagerBase.show = lambda manager: draw(manager.canvas.figure)
        Figure.show = lambda figure, *_, **__: draw(figure)
        Image.Image.show = lambda image, *_, **__: show(image)
        ImageShow.show = lambda image, *_, **__: show(image)
        if "cv2" in sys.modules:
            self._bind_cv2(sys.modules["cv2"])
        self._bind_display()

    def _bind_cv2(self, cv2):
        """The functions of cv2 that want a window show or do nothing."""
        cv2.imshow = lambda _, array: self.show(_picture(array))
        cv2.waitKey = cv2.waitKeyEx = cv2.pollKey = lambda *_: -1
        for name in ("namedWindow", "destroyWindow", "destroyAllWindows", "moveWindow"):
            setattr(cv2, name, lambda *_, **__: None)

    def _bind_display(self):
        """`from IPython.display import display` shows here, whether IPython is installed or not."""
        for name in ("IPython", "IPython.core", "IPython.core.display", "IPython.display"):
            module = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__path__ = []
            module.version_info = (99, 0)  # matplotlib asks
            module.get_ipython = lambda: None
            module.display = self.display
            module.clear_output = lambda *_, **__: None
            module.HTML = module.Markdown = module.Pretty = module.Latex = str
            module.Image = _file_picture
            sys.modules[name] = module
        sys.modules["IPython"].display = sys.modules["IPython.display"]

    def display(self, *values, **_):
        """Show images and figures; print the repr of everything else."""
        for value in values:
            if isinstance(value, Image.Image):
                self.show(value)
            elif isinstance(value, self.pyplot.Figure):
                self.draw(value)
            else:
                print(repr(value))

    def show(self, image: Image.Image):
        """Add a figure to the reply and bind it: RGB, scaled down where it is too large."""
        width, height = image.size
        thin = min(width, height) == 0 or max(width, height) >= MAX_ASPECT * min(width, height)
        if thin:
            why = f"the aspect ratio must be below {MAX_ASPECT}"
            print(f"[Not shown: {width}x{height} pixels; {why}.]")
            return
        if len(self.sizes) == MAX_FIGURES:
            raise RuntimeError(f"more than {MAX_FIGURES} figures in one call")
        image = rgb(image)
        size = self._size(width, height)
        if size != image.size:
            image = image.resize(size)
        self.namespace[f"image_clue_{self.next_clue + len(self.sizes)}"] = image
        self.sizes.append(image.size)
        self.pixels.append(image.tobytes())

    def _size(self, width, height):
        """The size at which a figure fits, with room left for those that may follow."""
        used = sum(w * h for w, h in self.sizes)
        later = MAX_FIGURES - len(self.sizes) - 1
        room = min(MAX_PIXELS, MAX_CALL_PIXELS - used - later * KEPT_PIXELS)
        if width * height <= room:
            return width, height
        scale = (room / (width * height)) ** 0.5
        sides = [max(int(side * scale), 1) for side in (width, height)]
        longest = (MAX_ASPECT - 1) * min(sides)
        return tuple(min(side, longest) for side in sides)

    def draw(self, figure):
        """Show a matplotlib figure and close it."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        try:
            width, height = figure.get_size_inches() * figure.dpi
            scale = (MAX_PIXELS / (width * height)) ** 0.5
            figure.set_dpi(figure.dpi * min(1, scale))
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            picture = Image.fromarray(self.namespace["np"].asarray(canvas.buffer_rgba()))
        finally:
            self.pyplot.close(figure)
        self.show(picture)

    def close_since(self, before: list):
        """Close the figures that were opened since there were those."""
        for manager in open_figures():
            if manager not in before:
                self.pyplot.close(manager.num)


def open_figures() -> list:
    """The managers of the figures that pyplot holds."""
    from matplotlib._pylab_helpers import Gcf

    return Gcf.get_all_fig_managers()


def _picture(array):
    """An array as cv2 has them (blue, green, red; floats from 0 to 1; 16 bits) as a PIL image."""
    import numpy

    array = numpy.asarray(array)
    if array.dtype.kind == "f":
        array = array * 255
    if array.dtype == numpy.uint16:
        array = array // 256
    array = numpy.clip(array, 0, 255).astype("uint8")
    if array.ndim == 3:
        array = array[..., 2::-1] if array.shape[2] >= 3 else array[..., 0]
    return Image.fromarray(array)


def _file_picture(data=None, filename=None, **_):
    """IPython.display.Image: a picture from a file or from the bytes of one."""
    source = data if filename is None else filename
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def open_video(number, descriptor, frames):
    """A decord VideoReader that opens at its first use and notes the frames that it decodes."""
    import decord

    class VideoReader(decord.VideoReader):
        _handle = None
        _at = 0  # the frame that comes next
        _bytes = 0  # of a frame, once there was one

        def __init__(self):
            pass

        def __getattr__(self, name):
            """What opening would have set is asked for the first time."""
            private = name.startswith("_") and not name.startswith("__")
            if self._handle is not None or not private:
                raise AttributeError(name)
            try:
                super().__init__(f"/proc/self/fd/{descriptor}", num_threads=1)
            except Exception as error:  # decord has no class of its own for them all
                reason = str(error).splitlines()[0]
                raise OSError(f"video_clue_{number} cannot be read: {reason}") from None
            return getattr(self, name)

        def next(self):
            if self._at < len(self):
                frames.append((number, self._at))
            self._at += 1
            _need(self._bytes)
            frame = super().next()
            self._bytes = math.prod(frame.shape)
            return frame

        def get_batch(self, indices):
            wanted = [int(index) % len(self) for index in indices]
            if len(wanted) > 1 and not self._bytes:
                self._bytes = math.prod(super().get_batch(wanted[:1]).shape)
            _need(len(wanted) * self._bytes)
            frames.extend((number, index) for index in wanted)
            return super().get_batch(indices)

        def seek_accurate(self, pos):
            self._at = range(len(self))[pos]
            super().seek_accurate(pos)

        seek = seek_accurate
        __next__ = next

    return VideoReader()


def _need(size):
    """MemoryError if there is no room for so many bytes: decord would end the process."""
    try:
        mmap.mmap(-1, size + size // 8 + DECORD_BYTES).close()
    except (OSError, OverflowError):
        raise MemoryError(f"frames of {size / 1e6:.1f} MB do not fit") from None
