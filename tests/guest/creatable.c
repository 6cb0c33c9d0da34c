/* A plugin for QEMU that lets the user create a device which is there but not offered.
 *
 * QEMU has a device that speaks vhost-user for any kind of virtio device; QEMU 10.0 does not let one create it
 * on the command line.  What forbids it is one flag in the device's class.  Where the flag lies is found by
 * comparing: it is set in classes that may be created and not in others, and nothing else in them is so.
 * If that does not lead to exactly one byte, nothing is written and QEMU says why it ends.
 *
 * The plugin's argument is the device: `device=NAME`.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* The plugin interface and the object model, as far as they are used here. */
typedef struct ObjectClass ObjectClass;
extern ObjectClass *object_class_by_name(const char *name);
__attribute__((visibility("default"))) int qemu_plugin_version = 2;

/* Devices that every build for x86 has.  Of both kinds some can be plugged while the machine runs and some cannot, since
 * the flag for that lies beside ours. */
static const char *const offered[] = { "virtio-balloon-pci", "virtio-rng-pci", "virtio-serial-pci", "VGA", "pvpanic",
                                       "i6300esb", "isa-debugcon", "e1000", "vmcoreinfo", NULL };
static const char *const withheld[] = { "mch", "ICH9-LPC", "i440FX", "PIIX3", "ioapic", "hpet", "isa-pit", "port92",
                                        "kvmvapic", "fw_cfg_io", "q35-pcihost", NULL };
/* The class begins with what all objects have; the flag lies in the part of all devices, which ends before 256 bytes. */
enum { FIRST = 64, END = 256, LEAST = 4 };

static int agree(const char *const *names, size_t at, unsigned char wanted)
{
    int seen = 0;
    for (; *names; names++) {
        const unsigned char *class = (const unsigned char *)object_class_by_name(*names);
        if (!class)
            continue;
        if (class[at] != wanted)
            return 0;
        seen++;
    }
    return seen;
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
    const char *name = argc == 1 && !strncmp(argv[0], "device=", 7) ? argv[0] + 7 : "";
    unsigned char *class = (unsigned char *)object_class_by_name(name);
    size_t found = 0;
    int count = 0;

    (void)id, (void)info;
    for (size_t at = FIRST; at < END; at++)
        if (agree(offered, at, 1) >= LEAST && agree(withheld, at, 0) >= LEAST) {
            found = at;
            count++;
        }
    if (!class || count != 1 || class[found] != 0) {
        fprintf(stderr, "creatable: %s: class %p, %d bytes fit, the last at %zu\n", name, (void *)class, count, found);
        return 1;
    }
    class[found] = 1;
    fprintf(stderr, "creatable: %s: the byte at %zu was 0 and is %d\n", name, found, class[found]);
    return 0;
}
