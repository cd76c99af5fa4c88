"""What generated images usually get of the rewards that have a name, as the table of the pages says it, too."""

RANGES = {
    "shapes": (0.0, 1.0),
    "shapes-strict": (0.0, 1.0),
    "shapes-critic": (0.1, 1.0),
    "jpeg-compressibility": (-150.0, -10.0),
    "jpeg-incompressibility": (10.0, 150.0),
    "clip-score": (20.0, 35.0),
    "pick-score": (18.0, 24.0),
    "aesthetic": (4.5, 7.0),
    "hps-v2": (0.24, 0.28),
    "hps-v2.1": (0.22, 0.32),
    "hps-v3": (-5.0, 15.0),
    "image-reward": (-2.3, 2.0),
    "vqa-score": (0.0, 1.0),
    "graded-judge": (0.0, 1.0),
    "composition": (0.0, 1.0),
    "ocr": (0.0, 1.0),
}
"""Lowest and highest; a score beyond is no fault. That of a CLIP of one's own (`shapes-clip`) depends on its scale."""
