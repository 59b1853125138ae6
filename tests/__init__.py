"""A package, so that `tests.<helper>` is never looked for in a wheel that ships a `tests` of its own."""
