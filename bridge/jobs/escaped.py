"""Text of any origin, such as names in files, so that it does nothing to a terminal."""


def escaped(text: str) -> str:
    r"""What `repr` would escape is escaped: control characters (\x1b), newlines, marks of the writing direction."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
