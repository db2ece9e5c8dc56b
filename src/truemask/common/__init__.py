"""What every room may use and that knows nothing of masks: messages, checks of arguments, torch's insides.

Nouns: a *finding* (something likely wrong, with code, place and way out), a *remembered* value (worked out once, made
of real tensors only), *arguments* (numbers and tensors checked where they come in). Nothing that imports another room
comes in here; the private names of torch that several rooms need stand in `torch_internals` and `real_tensors`. The
words: docs/internals/glossary.md.
"""
