"""What the error messages of VMMs, kernels and other programs mean for extended state.

`table` has the messages, a row each with its source. `names` sorts CPU features into state,
instructions, speed and what is not ours. `values` reads the numbers in a text: masks, sizes, MSRs,
CPUID registers. `answer` puts the three together: `answers(text)` is what ``xfast explain`` prints.
"""
