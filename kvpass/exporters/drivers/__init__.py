"""The parts of the example that lies beside an exported file; the audit runs the same text."""
