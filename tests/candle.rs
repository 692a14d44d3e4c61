//! Skeleton.
use candle_core as _;
use candle_nn as _;
use candle_transformers as _;
