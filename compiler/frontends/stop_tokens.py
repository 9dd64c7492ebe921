"""Tokens that end a turn in the chat formats of the supported families, where a model's files don't name them."""

END_OF_TURN = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"})
