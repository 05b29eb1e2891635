"""One file a model family; the file name is the model_type of config.json.

Families that are known and not served are here, with the reason.
"""

_OWN = "transformers runs its experts in code of their own, not through its experts interface"

REFUSED = {
    "dbrx": _OWN,
    "deepseek_v4": "transformers writes its last norm under a name that it does not read back",
    "diffusion_gemma": "it denoises blocks of text; there is no next token to predict",
    "doge": _OWN,
    "ernie4_5_vl_moe": "its layers have two sets of experts, for text and for images",
    "inkling2": "its layers read what several layers before them gave",
    "jetmoe": _OWN,
    "llama4": _OWN,
    "longcat_flash": _OWN,
    "mistral_large4": "its layers share keys and values with layers before them",
    "nllb_moe": _OWN,
    "openai_privacy_filter": "it labels tokens; there is no next token to predict",
    "qwen3_omni_moe": "it is two models, a thinker and a talker; give the thinker by itself",
    "step3p7": _OWN,
    "switch_transformers": _OWN,
    "zaya": "its routers read the router of the layer before, and may choose no expert",
}
