"""`aurora-lit pretrain`: a first draft from prompts and text.

The target reads text and answers prompts on the serving engine; a draft is trained on the recorded traces.

May import: learn/data/, serve/worker/ and above. Start with stages.py. The files, each importing only those above it:

    prompts.py           prompt files, also for benchmarks
    generate_answers.py  stage two: the target answers prompts
    record_text.py       stage one: the target reads text, and its states at every position are recorded
    trainer.py           the training loop, resumable
    stages.py            the stages in order
"""
