"""``torch.compile(model, backend="kvpass")``, and the scopes in which what it compiled keeps a cache."""
