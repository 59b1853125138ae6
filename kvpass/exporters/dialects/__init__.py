"""What each family of formats can say: its inputs, and how each op of kvpass is said in ops that its runtimes have."""
