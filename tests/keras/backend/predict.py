"""Predict with the models that all backends have left in a folder; print whose predicted alike."""

import sys
from pathlib import Path

import keras
import numpy as np
from networks import data

import fusebn.keras  # noqa: F401  registers the layer

for path in sorted(Path(sys.argv[1]).glob("*.keras")):
    model = keras.models.load_model(path)
    found = model.predict(data()[0], verbose=0)
    np.testing.assert_allclose(found, np.load(path.with_suffix(".npy")), atol=1e-4, rtol=1e-4)
    print(path.stem)
