/* A stand-in for libnvidia-ml.so.1: one card, which takes 3 J between two readings. */
#include <string.h>

static unsigned long long taken = 1000;
static int card;

int nvmlInit_v2(void) { return 0; }

int nvmlSystemGetDriverVersion(char *text, unsigned length) {
  strncpy(text, "580.1", length);
  return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  *handle = &card;
  return strcmp(uuid, "GPU-1-2") ? 6 : 0;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
  taken += 3000;
  *millijoules = taken;
  return handle == &card ? 0 : 2;
}
