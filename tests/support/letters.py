"""A tokenizer of numbers."""


class Letters:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(c) % 290 for c in text]}

    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)
