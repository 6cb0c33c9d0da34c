"""What sparsemem promises, by name; tests say with `@pytest.mark.promise(name)` which they show.

`docs/reliability.md` is made from this and from what the tests counted (`make reliability`).
"""

PROMISES = {
    "any-order-of-operations": "Whatever is done in whatever order, bitmap, content and memory are what a dict says.",
    "reserve-costs-nothing": "Reserving takes no memory, however large the region is.",
    "plugged-memory-is-there": "Every byte of a plugged block can be read and written, whatever runs out afterwards.",
    "plug-all-or-nothing": "A plug that fails leaves all as it was: blocks, memory, content, budget, listeners.",
    "unplug-gives-back": "An unplug gives back exactly the memory of its blocks, to where it came from.",
    "unplug-says-what-happened": "An unplug is checked first; if it fails all the same, the error says what is gone.",
    "tainted-is-mended": "What a failed discard leaves unknown is tainted, refused, and mended by scrub().",
    "plugged-reads-zero": "A plugged block reads zero (or its template), never what it or another had before.",
    "existing-data-is-safe": "What a file holds is refused, adopted or discarded as asked; no template is changed.",
    "single-memory": "A private file costs what is plugged, and not double.",
    "audit-tells-the-truth": "audit() finds leaks and gaps, as the kernel's own accounting has them.",
    "headroom-refuses-first": "A plug that limits do not allow is refused before anything is touched.",
    "budget-is-exact": "A budget equals what is plugged, at every moment.",
    "listeners-equal-bitmap": "What listeners were told equals the bitmap; a veto undoes everything.",
    "views-never-dangle": "No view reaches memory that is unmapped or unplugged, in whatever order things die.",
    "close-does-not-mask": "Closing never hides the error of the body, and leaves nothing behind.",
    "interrupt-safe": "A KeyboardInterrupt or signal at any point loses nothing and holds nothing.",
    "stops-when-told": "cancel, deadline and progress stop an operation, which is undone or says how far it came.",
    "fork-safe": "A child can neither use nor harm its parent's region, unless both were meant to have it.",
    "threads-lose-nothing": "Threads and processes on one region lose no block and tear no state.",
    "no-deadlock": "Nobody waits for ever: not in callbacks, finalisers, forks, nor for who never stops.",
    "make-or-leave-nothing": "A region that cannot be made leaves nothing behind, and no file changed.",
    "crash-leaves-nothing": "A process killed at any moment loses no memory for others, and no other file.",
    "huge-pages-stay-exact": "Blocks take exactly their size in every mode of transparent huge pages.",
    "secret-only-grows": "memfd_secret is never said to be given back: unplug is refused, a failed plug zeroed.",
    "peers-keep-their-blocks": "Regions that share memory, with blocks by agreement, leave each other's alone.",
    "private-to-its-user": "Descriptors are closed on exec, memfds sealed, files 0600, links not followed.",
    "hostile-peer-is-contained": "Who shares the memory can spoil content, but not make another's state untrue.",
    "strays-are-caught": "With a protection, an access to an unplugged block is caught, and all else is as without.",
    "hostile-guest-is-contained": "Whatever a guest or frontend sends to a device, the host's state stays true.",
    "no-leaks": "Descriptors, mappings, memory and objects stay flat, however often.",
    "memory-safe": "The shim has no data race and no memory error that the sanitizers see.",
}
