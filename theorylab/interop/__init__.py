"""Faces for other ecosystems; each module needs the package that it is named after, and holds no algorithm of its own."""
