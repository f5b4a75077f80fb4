"""A program: the log probabilities that vLLM's engine gives a prompt's tokens. The plugin is found as a user has it.

python vllm_engine.py model '[1, 5, 9]' '{"quantization": "lowbit"}'
"""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # the engine's processes import this file
    directory, ids, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    sizes = {"max_model_len": 32, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    llm = LLM(directory, skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=False, **sizes, **options)
    sampling = SamplingParams(temperature=0, max_tokens=4, detokenize=False, ignore_eos=True, prompt_logprobs=1)
    [result] = llm.generate([{"prompt_token_ids": ids}], sampling)
    print("LOGPROBS", json.dumps([result.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]))
