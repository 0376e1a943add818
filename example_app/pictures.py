"""What Pillow does: pictures in, thumbnails out. Nothing here knows the database or the queue."""

from __future__ import annotations

import io

import PIL.Image
import PIL.ImageOps

#: The longest sides of the thumbnails, in pixels.
SIZES = (128, 256, 512)
#: File names that are taken, and the formats that Pillow may then try; it knows others, some of
#: which start programs.
FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
#: Some files of a few kilobytes unpack to gigabytes.
MAX_PIXELS = 50_000_000


class PictureError(Exception):
    """A picture of which no thumbnail can be made; the message is for the person who sent it."""


def shrink(data: bytes, size: int) -> PIL.Image.Image:
    """Return a picture made to fit a square.

    :param data: the content of a picture file.
    :param size: the side of the square, in pixels.
    :raises PictureError: if it cannot be read, or is too large to.
    """
    try:
        file = PIL.Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
        if file.width * file.height > MAX_PIXELS:  # known before any of them is unpacked
            raise PIL.Image.DecompressionBombError
        file.draft(None, (2 * size, 2 * size))  # lets a large JPEG be unpacked smaller
        transparent = "A" in file.getbands() or "transparency" in file.info
        picture = file.convert("RGBA" if transparent else "RGB")
        picture.thumbnail((size, size))
        return PIL.ImageOps.exif_transpose(picture)
    except PIL.UnidentifiedImageError as error:
        raise PictureError("This is not a picture, or of a kind that is not known here.") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise PictureError(
            f"The picture is too large: more than {MAX_PIXELS // 1_000_000} million pixels."
        ) from error
    except MemoryError:  # no fault of the picture's
        raise
    except Exception as error:  # the readers of the formats raise whatever broken bytes lead to
        words = str(error).rstrip(".") or type(error).__name__
        raise PictureError(f"The picture is damaged: {words}.") from error
