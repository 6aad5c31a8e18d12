"""The Triton kernels, interpreted, against the oracle: every verb, both views, all types."""

import numpy as np
import pytest
import torch

from fusebn import _reference as reference
from interpreted import fused, verbs
