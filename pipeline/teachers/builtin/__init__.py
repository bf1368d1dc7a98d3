"""The teacher and the judge that ship with the package: no network is needed for a first run.

``teacher.path: builtin`` means :data:`TEACHER`, a miniature of Stable Diffusion in a diffusers pipeline folder: tinted
garments of 32x32 pixels from captions such as "a teal ankle boot on a white background". :data:`JUDGE` is a small
open_clip model of the same garments, which knows nothing of the teacher. ``pipeline/builtin/`` made both; the cards
beside them say how, and how good they are.
"""

from pathlib import Path

NAME = "builtin"
"""What a config says for it."""
TEACHER = Path(__file__).with_name("teacher")
"""A diffusers pipeline folder, weights in float16."""
JUDGE = Path(__file__).with_name("judge")
"""A folder that open_clip loads as ``local-dir:JUDGE``, and statistics of real garments in its features."""
