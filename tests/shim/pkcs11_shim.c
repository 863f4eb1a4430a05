/*
 * A PKCS#11 module (v2.40) that forwards to a real one, and is slow, refuses, hangs or crashes where it is told to.
 *
 * What it wraps stands in the file <this library>.settings: "module=PATH", and where the real module's C_Initialize needs
 * a string in pReserved (NSS), "reserved=STRING". The file <this library>.control is mapped by every process that loads
 * it and by the test, which sets faults in it while they run; pkcs11_shim.py writes both files and knows the layout.
 * It keeps no secret and changes no argument.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long U; /* CK_ULONG, every handle and flag */
typedef unsigned char B; /* CK_BBOOL */
typedef void *P;         /* every pointer */

#define CKR_OK 0UL
#define CKR_GENERAL_ERROR 5UL
#define CKR_BUFFER_TOO_SMALL 0x150UL
#define CKF_OS_LOCKING_OK 2UL
#define FOR_EVER UINT64_MAX
#define NAP_NS 1000000L

/* The functions in the order of CK_FUNCTION_LIST (PKCS#11 v2.40, 3.6), without C_GetFunctionList, which is the fourth. */
#define FUNCTIONS_BEFORE(F) \
    F(C_Initialize, (P a), (a)) \
    F(C_Finalize, (P a), (a)) \
    F(C_GetInfo, (P a), (a))
#define FUNCTIONS_AFTER(F) FUNCTIONS_AFTER_(F, F)
/* What F does for most functions, E does for those that end the session's operation, also when they fail. */
#define FUNCTIONS_AFTER_(F, E) \
    F(C_GetSlotList, (B a, P b, P c), (a, b, c)) \
    F(C_GetSlotInfo, (U a, P b), (a, b)) \
    F(C_GetTokenInfo, (U a, P b), (a, b)) \
    F(C_GetMechanismList, (U a, P b, P c), (a, b, c)) \
    F(C_GetMechanismInfo, (U a, U b, P c), (a, b, c)) \
    F(C_InitToken, (U a, P b, U c, P d), (a, b, c, d)) \
    F(C_InitPIN, (U a, P b, U c), (a, b, c)) \
    F(C_SetPIN, (U a, P b, U c, P d, U e), (a, b, c, d, e)) \
    F(C_OpenSession, (U a, U b, P c, P d, P e), (a, b, c, d, e)) \
    F(C_CloseSession, (U a), (a)) \
    F(C_CloseAllSessions, (U a), (a)) \
    F(C_GetSessionInfo, (U a, P b), (a, b)) \
    F(C_GetOperationState, (U a, P b, P c), (a, b, c)) \
    F(C_SetOperationState, (U a, P b, U c, U d, U e), (a, b, c, d, e)) \
    F(C_Login, (U a, U b, P c, U d), (a, b, c, d)) \
    F(C_Logout, (U a), (a)) \
    F(C_CreateObject, (U a, P b, U c, P d), (a, b, c, d)) \
    F(C_CopyObject, (U a, U b, P c, U d, P e), (a, b, c, d, e)) \
    F(C_DestroyObject, (U a, U b), (a, b)) \
    F(C_GetObjectSize, (U a, U b, P c), (a, b, c)) \
    F(C_GetAttributeValue, (U a, U b, P c, U d), (a, b, c, d)) \
    F(C_SetAttributeValue, (U a, U b, P c, U d), (a, b, c, d)) \
    F(C_FindObjectsInit, (U a, P b, U c), (a, b, c)) \
    F(C_FindObjects, (U a, P b, U c, P d), (a, b, c, d)) \
    F(C_FindObjectsFinal, (U a), (a)) \
    F(C_EncryptInit, (U a, P b, U c), (a, b, c)) \
    E(C_Encrypt, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_EncryptUpdate, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_EncryptFinal, (U a, P b, P c), (a, b, c)) \
    F(C_DecryptInit, (U a, P b, U c), (a, b, c)) \
    E(C_Decrypt, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_DecryptUpdate, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_DecryptFinal, (U a, P b, P c), (a, b, c)) \
    F(C_DigestInit, (U a, P b), (a, b)) \
    F(C_Digest, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_DigestUpdate, (U a, P b, U c), (a, b, c)) \
    F(C_DigestKey, (U a, U b), (a, b)) \
    F(C_DigestFinal, (U a, P b, P c), (a, b, c)) \
    F(C_SignInit, (U a, P b, U c), (a, b, c)) \
    E(C_Sign, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_SignUpdate, (U a, P b, U c), (a, b, c)) \
    F(C_SignFinal, (U a, P b, P c), (a, b, c)) \
    F(C_SignRecoverInit, (U a, P b, U c), (a, b, c)) \
    F(C_SignRecover, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_VerifyInit, (U a, P b, U c), (a, b, c)) \
    E(C_Verify, (U a, P b, U c, P d, U e), (a, b, c, d, e)) \
    F(C_VerifyUpdate, (U a, P b, U c), (a, b, c)) \
    F(C_VerifyFinal, (U a, P b, U c), (a, b, c)) \
    F(C_VerifyRecoverInit, (U a, P b, U c), (a, b, c)) \
    F(C_VerifyRecover, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_DigestEncryptUpdate, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_DecryptDigestUpdate, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_SignEncryptUpdate, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_DecryptVerifyUpdate, (U a, P b, U c, P d, P e), (a, b, c, d, e)) \
    F(C_GenerateKey, (U a, P b, P c, U d, P e), (a, b, c, d, e)) \
    F(C_GenerateKeyPair, (U a, P b, P c, U d, P e, U f, P g, P h), (a, b, c, d, e, f, g, h)) \
    F(C_WrapKey, (U a, P b, U c, U d, P e, P f), (a, b, c, d, e, f)) \
    F(C_UnwrapKey, (U a, P b, U c, P d, U e, P f, U g, P h), (a, b, c, d, e, f, g, h)) \
    F(C_DeriveKey, (U a, P b, U c, P d, U e, P f), (a, b, c, d, e, f)) \
    F(C_SeedRandom, (U a, P b, U c), (a, b, c)) \
    F(C_GenerateRandom, (U a, P b, U c), (a, b, c)) \
    F(C_GetFunctionStatus, (U a), (a)) \
    F(C_CancelFunction, (U a), (a)) \
    F(C_WaitForSlotEvent, (U a, P b, P c), (a, b, c))

#define PLACE(name, parameters, arguments) AT_##name,
enum { FUNCTIONS_BEFORE(PLACE) AT_C_GetFunctionList, FUNCTIONS_AFTER(PLACE) PLACES };

#define MEMBER(name, parameters, arguments) U(*name) parameters;
struct list {
    B version[2];
    FUNCTIONS_BEFORE(MEMBER)
    U (*C_GetFunctionList)(struct list **);
    FUNCTIONS_AFTER(MEMBER)
};

/* One function's part of the control file: what was counted, and the fault. All are set and read without a lock. */
struct slot {
    uint64_t calls;    /* counted: calls so far */
    uint64_t running;  /* counted: calls that have not returned */
    uint64_t fired;    /* counted: calls that the fault met */
    uint64_t skip;     /* so many calls go through first */
    uint64_t times;    /* then so many meet the fault; FOR_EVER: all */
    uint64_t delay_us; /* the fault: sleep first, */
    uint64_t hang;     /* then wait while this is not 0, */
    uint64_t number;   /* then this signal, which must end the process, */
    uint64_t code;     /* then this CKR instead of the call; 0: the call */
    uint64_t who;      /* whom it meets: 0 all threads, 1 a process's first one, 2 the others */
};

static struct list real, own;
static const struct list *wrapped;
static struct slot nothing[PLACES], *slots = nothing;
static char reserved[PATH_MAX];

/* CK_C_INITIALIZE_ARGS, with the member that NSS has after the standard's last one. */
struct initialize_arguments {
    P create, destroy, lock, unlock;
    U flags;
    P reserved, beyond;
};

static int read_settings(const char *library, char *module)
{
    char path[PATH_MAX], line[PATH_MAX];
    FILE *file;
    snprintf(path, sizeof path, "%s.settings", library);
    if ((file = fopen(path, "re")) == NULL)
        return -1;
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "module=", 7) == 0)
            snprintf(module, PATH_MAX, "%s", line + 7);
        else if (strncmp(line, "reserved=", 9) == 0)
            snprintf(reserved, sizeof reserved, "%s", line + 9);
    }
    fclose(file);
    return module[0] ? 0 : -1;
}

static void map_control(const char *library)
{
    char path[PATH_MAX];
    int file;
    void *place;
    snprintf(path, sizeof path, "%s.control", library);
    if ((file = open(path, O_RDWR | O_CLOEXEC)) < 0)
        return;
    if (lseek(file, 0, SEEK_END) == (off_t)sizeof nothing) {
        place = mmap(NULL, sizeof nothing, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (place != MAP_FAILED)
            slots = place;
    }
    close(file);
}

/* The real module, loaded when this one is. Without it every function fails. */
__attribute__((constructor)) static void load(void)
{
    Dl_info self;
    char module[PATH_MAX] = "";
    void *library;
    U (*get)(struct list **);
    struct list *found;
    if (!dladdr((void *)load, &self) || read_settings(self.dli_fname, module) != 0) {
        fprintf(stderr, "pkcs11_shim: no settings beside the library\n");
        return;
    }
    map_control(self.dli_fname);
    if ((library = dlopen(module, RTLD_NOW | RTLD_LOCAL)) == NULL) {
        fprintf(stderr, "pkcs11_shim: %s\n", dlerror());
        return;
    }
    *(void **)&get = dlsym(library, "C_GetFunctionList");
    if (get != NULL && get(&found) == CKR_OK) {
        real = *found;
        wrapped = &real;
    }
}

static void nap(uint64_t ns)
{
    struct timespec left = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    while (nanosleep(&left, &left) != 0)
        ;
}

/* Take one from a counter that is neither 0 nor FOR_EVER. Whether it was more than 0. */
static int take(uint64_t *counter)
{
    uint64_t seen = __atomic_load_n(counter, __ATOMIC_SEQ_CST);
    while (seen != 0) {
        if (seen == FOR_EVER)
            return 1;
        if (__atomic_compare_exchange_n(counter, &seen, seen - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return 1;
    }
    return 0;
}

static int is_meant(const struct slot *slot)
{
    uint64_t who = __atomic_load_n(&slot->who, __ATOMIC_SEQ_CST);
    int first = syscall(SYS_gettid) == getpid();
    return who == 0 || (who == 1) == first;
}

/* Count the call and do what the slot says. CKR_OK: make the real call. */
static U before(struct slot *slot)
{
    uint64_t number;
    __atomic_add_fetch(&slot->calls, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&slot->running, 1, __ATOMIC_SEQ_CST);
    if (wrapped == NULL)
        return CKR_GENERAL_ERROR;
    if (__atomic_load_n(&slot->times, __ATOMIC_SEQ_CST) == 0 || !is_meant(slot) || take(&slot->skip) || !take(&slot->times))
        return CKR_OK;
    __atomic_add_fetch(&slot->fired, 1, __ATOMIC_SEQ_CST);
    nap(__atomic_load_n(&slot->delay_us, __ATOMIC_SEQ_CST) * 1000);
    while (__atomic_load_n(&slot->hang, __ATOMIC_SEQ_CST) != 0)
        nap(NAP_NS);
    number = __atomic_load_n(&slot->number, __ATOMIC_SEQ_CST);
    if (number != 0) {
        signal((int)number, SIG_DFL);
        raise((int)number);
    }
    return __atomic_load_n(&slot->code, __ATOMIC_SEQ_CST);
}

static U after(struct slot *slot, U code)
{
    __atomic_sub_fetch(&slot->running, 1, __ATOMIC_SEQ_CST);
    return code;
}

/* What the real C_Initialize is given: the caller's arguments, or with a string in pReserved those that it needs. */
static P initialize_with(P given, struct initialize_arguments *made)
{
    if (!reserved[0])
        return given;
    memset(made, 0, sizeof *made);
    if (given != NULL)
        memcpy(made, given, offsetof(struct initialize_arguments, beyond));
    else
        made->flags = CKF_OS_LOCKING_OK;
    made->reserved = reserved;
    return made;
}

__attribute__((visibility("default"))) U C_Initialize(P given)
{
    struct initialize_arguments made;
    struct slot *slot = &slots[AT_C_Initialize];
    U code = before(slot);
    return after(slot, code != CKR_OK ? code : wrapped->C_Initialize(initialize_with(given, &made)));
}

#define FORWARD(name, parameters, arguments) \
    __attribute__((visibility("default"))) U name parameters \
    { \
        struct slot *slot = &slots[AT_##name]; \
        U code = before(slot); \
        return after(slot, code != CKR_OK ? code : wrapped->name arguments); \
    }

/* A refused call ends its operation, as the standard has it, unless the room is too small; the real module is made to. */
static void end_operation(int place, U session, P data, U size, P signature, U length)
{
    static __thread B scratch[1 << 17];
    U room = sizeof scratch;
    if (place == AT_C_Encrypt)
        real.C_Encrypt(session, data, size, scratch, &room);
    else if (place == AT_C_Decrypt)
        real.C_Decrypt(session, data, size, scratch, &room);
    else if (place == AT_C_Sign)
        real.C_Sign(session, data, size, scratch, &room);
    else
        real.C_Verify(session, data, size, signature, length);
    memset(scratch, 0, sizeof scratch);
}

#define FORWARD_AND_END(name, parameters, arguments) \
    __attribute__((visibility("default"))) U name parameters \
    { \
        struct slot *slot = &slots[AT_##name]; \
        U code = before(slot); \
        if (code != CKR_OK && code != CKR_BUFFER_TOO_SMALL && wrapped != NULL) \
            end_operation(AT_##name, a, b, c, (P)d, (U)e); \
        return after(slot, code != CKR_OK ? code : wrapped->name arguments); \
    }

FORWARD(C_Finalize, (P a), (a))
FORWARD(C_GetInfo, (P a), (a))
FUNCTIONS_AFTER_(FORWARD, FORWARD_AND_END)

__attribute__((visibility("default"))) U C_GetFunctionList(struct list **told)
{
    struct slot *slot = &slots[AT_C_GetFunctionList];
    U code = before(slot);
    if (code == CKR_OK) {
        own.version[0] = real.version[0];
        own.version[1] = real.version[1];
        own.C_GetFunctionList = C_GetFunctionList;
#define FILL(name, parameters, arguments) own.name = name;
        FUNCTIONS_BEFORE(FILL)
        FUNCTIONS_AFTER(FILL)
        *told = &own;
    }
    return after(slot, code);
}
