"""Frames of a video chosen from outside: by number, in the middles of equal parts, at a rate.

The policy's own code chooses frames inside the sandbox. These functions are for everybody else: the
baselines that see uniform frames in their context, and the report that shows where a policy looked.
All times are in seconds from the start of the video. Every function raises `DataError` for a video
that cannot be read.
"""

import functools
import os

import numpy as np
from PIL import Image

from data import DataError, Sample, open_image, open_video, video_info


@functools.lru_cache(maxsize=256)
def frame_times(path: str) -> np.ndarray:
    """The seconds at which the frames of a video start: (frames,)."""
    with open_video(path) as reader:
        numbers = list(range(len(reader)))
        times = reader.get_frame_timestamp(numbers)  # (frames, 2): start and end
    return times[:, 0]


def check_video(path: str) -> None:
    """Raises DataError for a video that vanished, or broke, after `load` had read it.

    What `video_info` and `frame_times` remember of a video does not notice.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    _decode_first(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def _decode_first(path, size, changed):
    """Decode the first frame, once for each state that the file is in."""
    with open_video(path) as reader:
        reader.next()


def duration(path: str) -> float:
    """The length of a video in seconds."""
    info = video_info(path)
    return info["frames"] / info["fps"]


def middle_frames(path: str, count: int) -> list[int]:
    """The numbers of the frames in the middles of `count` equal parts of a video; none twice."""
    times = frame_times(path)
    middles = (np.arange(count) + 0.5) * duration(path) / count
    following = np.searchsorted(times, times[0] + middles, side="right")
    return np.unique(following - 1).tolist()


def show_frames(path: str, numbers: list[int]) -> list[Image.Image]:
    """Frames of a video, by their numbers from 0, as PIL images."""
    images = []
    with open_video(path) as reader:
        for number in numbers:
            pixels = reader[number].asnumpy()
            images.append(Image.fromarray(pixels))
    return images


def uniform_frames(sample: Sample, frames: int | str) -> tuple[list[float], list[Image.Image]]:
    """What a policy that does not choose sees of a sample.

    frames: a number N, for the frames in the middles of N equal parts of each video, or a rate such
    as "1fps". Returns the seconds of the frames, and the context images: the sample's own images,
    then the frames.
    """
    wanted = str(frames)
    rate = wanted.removesuffix("fps")
    seconds = []
    images = [open_image(image) for image in sample.images]
    for path in sample.videos:
        count = duration(path) * float(rate)
        if rate == wanted:
            count = float(rate)
        numbers = middle_frames(path, max(1, round(count)))
        times = frame_times(path)[numbers]
        seconds += times.tolist()
        images += show_frames(path, numbers)
    return seconds, images
