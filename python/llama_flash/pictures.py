"""observe/pictures.py under the name that users import."""

from .observe.pictures import PICTURES, draw, draw_profile

__all__ = ["PICTURES", "draw", "draw_profile"]
