#pragma once
#include "tensor_view.h"
