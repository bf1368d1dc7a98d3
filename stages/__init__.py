"""Thin entry points, one verb each: parse, import, call. Nothing here is ever pickled."""
