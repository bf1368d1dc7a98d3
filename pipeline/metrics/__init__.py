"""What a set of images is worth: distances to other sets, to paired images and within a prompt, and what they cost."""
