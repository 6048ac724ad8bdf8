"""From a target alone to a draft for it: answers, features, loss, held-out accept length. Needs nothing of SGLang."""
