"""The files that ``evaluate`` leaves in its run folder, by name.

Owns: the names, for the command that writes the files and for those that read them without loading a model. Does not
own: their content (``evaluate.py``).
"""

EVALUATION_FILE = "evaluation.json"  # all figures
RESPONSES_FILE = "responses.jsonl"  # every response that was measured
PROMPTS_FILE = "prompts.jsonl"  # the prompts that were answered, as records
