"""A package, so that file names here may repeat elsewhere under tests/."""
