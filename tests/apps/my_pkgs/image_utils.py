from __future__ import annotations

from .models import Image


def resize(image: Image, size: tuple[int, int]) -> None:
    image.width, image.height = size
