"""Answer prompts in this process, without a server: python examples/without_a_server.py [key=value ...].

Arguments are settings, as on the command line: engine.max_batch_size=4
"""

import sys

from aurora_lit import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Two and two is", "The opposite of hot is"]

with LLM(overrides=sys.argv[1:]) as llm:
    for answer in llm.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0.0)):
        output = answer.outputs[0]
        print(f"{answer.prompt}|{output.text!r}: {output.accepted_length:.2f} tokens a round")
