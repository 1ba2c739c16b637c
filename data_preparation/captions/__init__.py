"""Phase one of InstructPix2Pix: from captions to (instruction, edited caption)."""
