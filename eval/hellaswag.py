"""placeholder, replaced below"""
def load_items(path=None): raise NotImplementedError
def evaluate(*a, **k): raise NotImplementedError
