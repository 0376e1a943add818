"""Pictures to upload, drawn by code."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator

from PIL import Image, ImageChops, ImageDraw, ImageFilter


def samples() -> Iterator[tuple[str, bytes]]:
    """Yield the file names and the contents of some pictures."""
    for name, draw in {
        "sunrise.jpg": sunrise,
        "city at dusk.webp": city,
        "night sea.jpg": night_sea,
        "pebbles.png": pebbles,
        "northern lights.png": northern_lights,
        "dunes.jpg": dunes,
    }.items():
        buffer = io.BytesIO()
        draw().save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]])
        yield name, buffer.getvalue()


def sunrise() -> Image.Image:
    picture = gradient((1500, 1000), "#35406f", "#a7688f", "#f29c7a", "#ffd98f")
    glow(picture, (960, 560), 340, "#ffb067")
    ImageDraw.Draw(picture).ellipse((870, 470, 1050, 650), fill="#fff3cf")
    for number, colour in enumerate(("#b06c86", "#7f5079", "#523a63", "#2c2547")):
        hills(picture, 600 + 95 * number, 60 - 8 * number, 1.3 * number, colour)
    return picture


def dunes() -> Image.Image:
    picture = gradient((1500, 1000), "#8ec6d8", "#cfe3dc", "#f6e6c4")
    for number, colour in enumerate(("#ecc08b", "#dea268", "#c9834d", "#a86439", "#7d4529")):
        hills(picture, 500 + 115 * number, 80, 2.1 * number + 0.6, colour)
    return picture


def night_sea() -> Image.Image:
    picture = gradient((1500, 1000), "#0a1030", "#1c2a5e", "#41568f")
    chance = random.Random(7)
    draw = ImageDraw.Draw(picture)
    for _ in range(160):
        x, y, r = chance.randrange(1500), chance.randrange(560), chance.choice((1, 1, 2))
        draw.ellipse((x - r, y - r, x + r, y + r), fill="#dfe6ff")
    glow(picture, (480, 270), 280, "#7f95d6")
    draw.ellipse((400, 190, 560, 350), fill="#fdf6dd")
    picture.paste(gradient((1500, 380), "#2b3d74", "#111a40", "#080c22"), (0, 620))
    for y in range(632, 1000, 9):
        spread = 30 + (y - 620) * 0.45
        for _ in range(4):
            middle, half = chance.gauss(480, spread), chance.uniform(8, 60)
            draw.rounded_rectangle((middle - half, y, middle + half, y + 4), 2, fill="#cfd3df")
    return picture


def city() -> Image.Image:
    picture = gradient((960, 1200), "#2b2f63", "#7d4f8b", "#e5876f", "#ffcf8b")
    chance = random.Random(11)
    draw = ImageDraw.Draw(picture)
    rows = (("#6a4a7d", "#8b6488", 560), ("#41345f", "#ffd48a", 720), ("#211d3c", "#ffc766", 880))
    for wall, light, top in rows:
        x = -20
        while x < 960:
            width, roof = chance.randrange(80, 170), top + chance.randrange(-150, 120)
            draw.rectangle((x, roof, x + width, 1200), fill=wall)
            for window_x in range(x + 14, x + width - 18, 24):
                for window_y in range(roof + 18, 1200, 34):
                    if chance.random() < 0.4:
                        box = (window_x, window_y, window_x + 10, window_y + 16)
                        draw.rectangle(box, fill=light)
            x += width + chance.randrange(0, 26)
    return picture


def northern_lights() -> Image.Image:
    picture = gradient((1500, 1000), "#050a1c", "#0b1d38", "#133a4f")
    for shift, colour in ((0, (40, 230, 140)), (120, (40, 150, 190)), (230, (150, 70, 190))):
        lights = Image.new("RGB", picture.size)
        draw = ImageDraw.Draw(lights)
        for x in range(-100, 1600, 5):
            foot = 640 - shift + 90 * math.sin(x / 210 + shift) + 35 * math.sin(x / 67)
            height = 330 + 90 * math.sin(x / 31 + shift) + 60 * math.sin(x / 13)
            for step in range(16):  # a ray, fading upwards
                shade = tuple(int(part * (1 - step / 16) ** 1.6) for part in colour)
                y = foot - height * step / 16
                draw.line((x + 3 * step, y, x + 3 * step + 3, y - height / 16), fill=shade, width=6)
        picture = ImageChops.screen(picture, lights.filter(ImageFilter.GaussianBlur(9)))
    draw = ImageDraw.Draw(picture)
    chance = random.Random(3)
    for x in range(-40, 1540, 34):  # spruces
        tip = 760 + chance.randrange(-70, 110)
        for tier in range(4):
            y, half = tip + tier * 62, 18 + tier * 15
            draw.polygon(((x, y), (x - half, y + 105), (x + half, y + 105)), fill="#04101a")
    draw.rectangle((0, 940, 1500, 1000), fill="#04101a")
    return picture


def pebbles() -> Image.Image:
    """With a transparent background."""
    picture = Image.new("RGBA", (1200, 1200))
    chance = random.Random(5)
    colours = ("#e4572e", "#f3a712", "#76b041", "#17bebb", "#2e6f9e", "#a23b72")
    for _ in range(46):
        layer = Image.new("RGBA", picture.size)
        x, y = chance.randrange(150, 1050), chance.randrange(150, 1050)
        r = chance.randrange(50, 170)
        colour = chance.choice(colours)
        ImageDraw.Draw(layer).ellipse((x - r, y - 0.8 * r, x + r, y + 0.8 * r), fill=f"{colour}c0")
        picture.alpha_composite(layer)
    return picture


def gradient(size: tuple[int, int], *colours: str) -> Image.Image:
    """From top to bottom through the colours."""
    strip = Image.new("RGB", (1, len(colours)))
    for y, colour in enumerate(colours):
        strip.paste(colour, (0, y, 1, y + 1))
    return strip.resize(size, Image.Resampling.BICUBIC)


def glow(picture: Image.Image, centre: tuple[int, int], radius: int, colour: str) -> None:
    (x, y), r = centre, radius / 2
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), fill=220)
    picture.paste(colour, mask=mask.filter(ImageFilter.GaussianBlur(radius / 3)))


def hills(picture: Image.Image, y: float, height: float, phase: float, colour: str) -> None:
    """A range of them, from side to side and down to the bottom edge."""
    line: list[tuple[float, float]] = [
        (x, y + height * (math.sin(x / 190 + phase) + 0.5 * math.sin(x / 83 + 2.3 * phase)))
        for x in range(0, picture.width + 10, 10)
    ]
    line += [(picture.width, picture.height), (0, picture.height)]
    ImageDraw.Draw(picture).polygon(line, fill=colour)
