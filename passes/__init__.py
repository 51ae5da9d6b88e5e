"""Graph rewrites: one file and one function per pass, in the order of :mod:`jvpgraph.passes.pipeline`."""
