"""Export: the rewritten step as a file that another runtime loads, with a manifest, an example, and an audit."""
