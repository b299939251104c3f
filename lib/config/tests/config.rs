//! The whole configuration: round trips, defaults, and every rule that can be broken.

use std::path::{Path, PathBuf};

use anemone_config::{
    Backend, Balloon, Cgroup, CgroupPlace, Config, Console, Cpus, Disk, Exposure, Id, Invalid,
    Kind, Mac, Net, NetType, PanicDevice, Pmem, Restart, Rng, Serial, Short, Sink, SinkType, Size,
    Switch, Uplink, VhostUser, Vm, Vsock, Within,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn parse(text: &str) -> Result<Config, String> {
    Config::from_toml(text, Path::new("VM.toml")).map_err(|error| error.to_string())
}

fn resolve(text: &str) -> Result<Vm, Invalid> {
    parse(&format!("kernel = \"bzImage\"\n{text}"))
        .expect("a configuration of the right form")
        .resolve()
}

fn path() -> impl Strategy<Value = PathBuf> {
    "[ -~äß]{1,12}".prop_map(PathBuf::from)
}

fn id() -> impl Strategy<Value = Id> {
    "[a-z0-9][a-zA-Z0-9._-]{0,31}".prop_map(|text| text.parse().expect("the form of an id"))
}

fn slot() -> impl Strategy<Value = Within<1, 31>> {
    (1u16..=31).prop_map(|n| Within::new(n).expect("in range"))
}

prop_compose! {
    fn disk()(
        path in option::of(path()), readonly: bool, id in option::of(id()),
        slot in option::of(slot()), queues in option::of(1u16..=64),
        serial in option::of("[ -~]{1,20}"), binary in option::of(path()),
        memory in option::of(prop_oneof![Just(Exposure::Shared), Just(Exposure::Bounce)]),
        socket in option::of(path()),
    ) -> Disk {
        Disk {
            path, format: None, readonly, id, slot,
            queues: queues.map(|n| Within::new(n).expect("in range")),
            serial: serial.map(|text| text.parse().expect("the form of a serial number")),
            memory, binary, socket,
        }
    }
}

prop_compose! {
    fn config()(
        name in option::of(id()), cpus in 1u16..=64, memory in 16u64..=512,
        kernel in option::of(path()), cmdline in option::of("[ -~]{0,40}"),
        disk in vec(disk(), 0..4), file in option::of(path()), slot in option::of(slot()),
        rate in option::of(any::<u64>()), rng in 0..3, panic_device in 0..3,
    ) -> Config {
        Config {
            name,
            cpus: Cpus { count: Within::new(cpus).expect("in range"), ..Cpus::default() },
            memory: anemone_config::Memory {
                size: Size(memory * (2 << 20)).to_string().parse().expect("in range"),
            },
            kernel,
            cmdline: cmdline.map(|text| text.parse().expect("the form of a command line")),
            disk,
            net: vec![Net {
                kind: Some(NetType::User),
                mtu: Some(Within::new(1280 + cpus).expect("in range")),
                ..Net::default()
            }],
            console: Some(Console { file: file.clone(), slot, ..Console::default() }),
            serial: file.map(|file| Serial { unix: Some(file), ..Serial::default() }),
            rng: match rng {
                0 => None,
                1 => Some(Switch::Off),
                _ => Some(Switch::On(Rng { rate: rate.map(Size), ..Rng::default() })),
            },
            panic_device: match panic_device {
                0 => None,
                1 => Some(Switch::Off),
                _ => Some(Switch::On(PanicDevice { slot })),
            },
            ..Config::default()
        }
    }
}

/// A table as the text of its command line option.
fn key_value(table: &toml::Table) -> String {
    table
        .iter()
        .map(|(key, value)| {
            let text = match value {
                toml::Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            format!("{key}={}", text.replace(',', ",,"))
        })
        .collect::<Vec<_>>()
        .join(",")
}

proptest! {
    #[test]
    fn toml_round_trip(config in config()) {
        let text = config.to_toml().expect("TOML can say everything");
        prop_assert_eq!(parse(&text), Ok(config));
    }

    #[test]
    fn key_value_round_trip(disk in disk()) {
        let table = toml::Table::try_from(&disk).expect("TOML can say everything");
        let text = key_value(&table);
        prop_assert_eq!(Disk::from_text(&text), Ok(disk), "{}", text);
    }

    /// Resolving fills in everything there is to fill in: doing it again changes nothing, also
    /// by way of the file.
    #[test]
    fn resolving_twice_is_resolving_once(config in config()) {
        if let Ok(vm) = config.resolve() {
            let text = vm.config.to_toml().expect("TOML can say everything");
            prop_assert_eq!(parse(&text).expect("own text").resolve(), Ok(vm));
        }
    }

    #[test]
    fn no_text_panics(text in ".*", toml in "[a-z]+ = [\\[\\]{}\",=a-z0-9.\n]*") {
        let _ = Disk::from_text(&text);
        let _ = Cpus::from_text(&text);
        let _ = Switch::<Rng>::from_text(&text);
        let _ = parse(&text);
        let _ = parse(&toml);
    }
}

#[test]
fn defaults_of_a_file_that_names_only_the_kernel() {
    let vm = resolve("").unwrap();
    assert_eq!(vm.kernel, Path::new("bzImage"));
    assert_eq!(vm.cmdline.as_str(), "console=hvc0");
    assert_eq!(vm.config.cpus.count.get(), 1);
    assert_eq!(vm.config.memory.size.bytes(), 512 << 20);
    assert_eq!(vm.panic_slot, Some(3));
    assert_eq!(vm.serial, None);
    assert_eq!(vm.devices.len(), 1);
    assert_eq!(vm.devices[0].slot, 1);
    assert_eq!(
        vm.devices[0].kind,
        Kind::Console {
            sink: Some(Sink::Stdio)
        }
    );
}

#[test]
fn slots_follow_the_rules_of_the_machine() {
    let vm = resolve(
        "rng = true\n\
         disk = [\"a.img\", \"b.img,slot=20,id=data\", { path = \"c.img\", queues = 4 }]\n\
         pmem = [\"d.img\", \"e.img,size=4M,readonly\"]\n\
         console = \"none\"\nserial = \"pty\"\npanic-device = \"slot=4\"\n",
    )
    .unwrap();
    let got: Vec<_> = vm
        .devices
        .iter()
        .map(|device| (device.id.as_str(), device.slot, device.queues))
        .collect();
    // The third disk has the slot of a third disk, whatever the second one chose.
    assert_eq!(
        got,
        [
            ("rng", 2, 1),
            ("disk0", 8, 1),
            ("data", 20, 1),
            ("disk2", 10, 4),
            ("pmem0", 24, 1),
            ("pmem1", 25, 1)
        ]
    );
    assert_eq!(
        vm.devices[5].kind,
        Kind::Pmem {
            path: "e.img".into(),
            size: Some(Size(4 << 20)),
            readonly: true
        }
    );
    assert_eq!(vm.panic_slot, Some(4));
    assert_eq!(vm.serial.unwrap().sink, Sink::Pty);
    assert_eq!(vm.cmdline.as_str(), "console=ttyS0");
}

#[test]
fn short_and_long_forms_are_the_same() {
    let short = parse("cpus = \"2,model=host\"\nmemory = \"1G\"\nconsole = \"file=a.log\"\n");
    let long =
        parse("[cpus]\ncount = 2\n[memory]\nsize = \"1024M\"\n[console]\nfile = \"a.log\"\n");
    assert_eq!(short, long);
    assert_eq!(parse("cpus = 2").unwrap().cpus.count.get(), 2);
    assert_eq!(parse("rng = true").unwrap(), parse("[rng]").unwrap());
    assert_eq!(
        parse("console = \"pty\"").unwrap().console.unwrap().kind,
        Some(SinkType::Pty)
    );
}

#[test]
fn network_cards() {
    let vm = resolve(
        "name = \"web\"\nconsole = \"none\"\n\
         net = [\"user,forward=udp:53-53\", \"tap=t0,queues=4\", \"tap=t1,mac-filter,slot=9\"]\n",
    )
    .unwrap();
    let got: Vec<_> = vm
        .devices
        .iter()
        .map(|device| (device.id.as_str(), device.slot, device.queues))
        .collect();
    // A control queue for several pairs, and for a filter.
    assert_eq!(got, [("net0", 16, 2), ("net1", 17, 9), ("net2", 9, 3)]);
    let Kind::Net(card) = &vm.devices[0].kind else {
        panic!("{:?}", vm.devices[0]);
    };
    assert_eq!(card.mac, Mac::of("web", "net0"));
    assert!(matches!(&card.uplink, Uplink::User { forward, .. } if forward.len() == 1));
    assert_eq!(vm.config.net[0].mac, Some(card.mac));
}

#[test]
fn a_back_end_that_runs_already() {
    let vm = resolve("disk = [\"socket=/run/blk.sock,id=x\"]\n").unwrap();
    assert_eq!(
        vm.devices[1].backend,
        Backend::Socket("/run/blk.sock".into())
    );
}

#[test]
fn paths_start_at_the_folder_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("VM.toml");
    std::fs::write(
        &file,
        "kernel = \"bzImage\"\ninitrd = \"/boot/initrd\"\ndisk = [\"a.img\"]\n[console]\nfile = \"out\"\n",
    )
    .unwrap();
    let config = Config::from_file(&file).unwrap();
    assert_eq!(config.kernel, Some(folder.path().join("bzImage")));
    assert_eq!(config.initrd, Some(PathBuf::from("/boot/initrd")));
    assert_eq!(config.disk[0].path, Some(folder.path().join("a.img")));
    assert_eq!(
        config.console.unwrap().file,
        Some(folder.path().join("out"))
    );
    let missing = Config::from_file(&folder.path().join("no.toml")).unwrap_err();
    assert!(
        missing.to_string().contains("no.toml: No such file"),
        "{missing}"
    );
}

#[test]
fn errors_of_the_file_name_line_found_and_allowed() {
    for (text, wanted) in [
        (
            "cpus = 65",
            &["VM.toml:1:", "65", "from 1 to 64", "cpus = 65"][..],
        ),
        ("[cpus]\ncount = 0", &["VM.toml:2:", "`0`", "from 1 to 64"]),
        (
            "name = \"a\"\nkernle = \"x\"",
            &["VM.toml:2:", "`kernle`", "`kernel`"],
        ),
        (
            "[[disk]]\npath = \"a\"\nformat = \"qcow2\"",
            &["VM.toml:3:", "qcow2", "`raw`"],
        ),
        (
            "[[disk]]\npath = \"a\"\nslot = 32",
            &["VM.toml:3:", "32", "from 1 to 31"],
        ),
        (
            "disk = [\"a,colour=red\"]",
            &["VM.toml:1:", "`colour`", "`readonly`"],
        ),
        ("machine = \"pc\"", &["pc", "`virt-1`"]),
        ("memory = \"31M\"", &["31M", "from 32M to 1T"]),
        ("memory = 512", &["512", "from 32M to 1T"]),
        ("accel = \"tcg\"", &["tcg", "`auto`, `kvm`, `soft`, `none`"]),
        ("cpus = \"1,model=486\"", &["486", "`host`"]),
        (
            "on-panic = \"explode\"",
            &["explode", "`stop`, `restart`, `ignore`"],
        ),
        ("sandbox = false", &["boolean", "`on`, `log`"]),
        ("net = [\"user,mtu=67\"]", &["`mtu`", "67", "68 to 65517"]),
        (
            "net = [\"user,mac=01:00:00:00:00:00\"]",
            &["`mac`", "unicast"],
        ),
        ("net = [\"tap=a/b\"]", &["`tap`", "a/b", "interface"]),
        (
            "net = [\"user,forward=80\"]",
            &["`forward`", "80", "tcp:8080-80"],
        ),
        ("net = [\"bridge\"]", &["`type`", "bridge", "`user`"]),
        ("\n\ncpus = [", &["VM.toml:3:"]),
    ] {
        let error = parse(text).unwrap_err();
        for part in wanted {
            assert!(error.contains(part), "{text}: {error} lacks {part}");
        }
    }
}

#[test]
fn memory_is_exposed_to_fast_back_ends_of_our_own_only() {
    let exposures = |text: &str| {
        let devices = resolve(text).unwrap().devices;
        let list = devices.iter().map(|d| format!("{} {}", d.id, d.memory));
        list.collect::<Vec<_>>().join(", ")
    };
    assert_eq!(
        exposures("rng = true\ndisk = [\"a\", \"socket=b\"]\n"),
        "console bounce, rng bounce, disk0 shared, disk1 bounce"
    );
    assert_eq!(
        exposures(
            "console = \"stdio,memory=shared\"\nrng = { socket = \"a\", memory = \"shared\" }\n\
             disk = [\"a,memory=bounce\", \"socket=b,memory=shared\"]\n"
        ),
        "console shared, rng shared, disk0 bounce, disk1 shared"
    );
    let devices = resolve("rng = true\ndisk = [\"a,memory=bounce,queues=64\", \"b\"]")
        .unwrap()
        .devices;
    let regions: Vec<u64> = devices.iter().map(|d| d.bounce_region()).collect();
    assert_eq!(
        regions,
        [
            2 * ((1 << 20) + 8192),
            (256 << 10) + 8192,
            64 * ((4 << 20) + 8192),
            0
        ]
    );
    assert!(regions.iter().all(|size| size.is_multiple_of(4096)));
}

#[test]
fn contradictions_are_refused() {
    let slot_taken = |slot, first: &str, second: &str| Invalid::SlotTaken {
        slot,
        first: first.to_owned(),
        second: second.to_owned(),
    };
    for (text, wanted) in [
        (
            "disk = [\"a,slot=9\", \"b\"]",
            slot_taken(9, "disk0", "disk1"),
        ),
        ("disk = [\"a,slot=1\"]", slot_taken(1, "console", "disk0")),
        ("rng = \"slot=3\"", slot_taken(3, "rng", "panic-device")),
        (
            "disk = [\"a,id=x\", \"b,id=x\"]",
            Invalid::IdTaken("x".to_owned()),
        ),
        (
            "disk = [\"a,id=console\"]",
            Invalid::IdTaken("console".to_owned()),
        ),
        ("serial = \"stdio\"", Invalid::StdioTaken),
        (
            "vsock = \"a,slot=3\"",
            slot_taken(3, "vsock", "panic-device"),
        ),
        ("vsock = \"cid=3\"", Invalid::NoSocket("vsock".to_owned())),
        (
            "vsock = \"socket=\"",
            Invalid::EmptyPath("vsock: socket".to_owned()),
        ),
        (
            "disk = [\"readonly=on\"]",
            Invalid::NoImage("disk0".to_owned()),
        ),
        ("fs = [\"path=d\"]", Invalid::NoTag("fs0".to_owned())),
        (
            "fs = [\"tag=a,path=d\", \"tag=b\"]",
            Invalid::NoDirectory("fs1".to_owned()),
        ),
        (
            "fs = [\"tag=a,path=\"]",
            Invalid::EmptyPath("fs0: path".to_owned()),
        ),
        (
            "fs = [\"tag=a,socket=s,uid-map=0:1:1\"]",
            Invalid::Meaningless {
                owner: "fs0".to_owned(),
                key: "uid-map",
                because: "beside `socket`: the back end has its own settings",
            },
        ),
        (
            "balloon = \"size=512M\"",
            Invalid::BalloonSize {
                id: "balloon".to_owned(),
                size: Size(512 << 20),
                memory: Size(512 << 20),
            },
        ),
        (
            "balloon = \"size=1000\"",
            Invalid::BalloonSize {
                id: "balloon".to_owned(),
                size: Size(1000),
                memory: Size(512 << 20),
            },
        ),
        (
            "balloon = \"slot=3\"",
            slot_taken(3, "balloon", "panic-device"),
        ),
        (
            "pmem = [\"readonly=on\"]",
            Invalid::NoFile("pmem0".to_owned()),
        ),
        (
            "pmem = [\"a,size=1M\"]",
            Invalid::PartialSize {
                id: "pmem0".to_owned(),
                size: Size(1 << 20),
            },
        ),
        (
            "pmem = [\"a,size=0\"]",
            Invalid::PartialSize {
                id: "pmem0".to_owned(),
                size: Size(0),
            },
        ),
        (
            "pmem = [\"path=\"]",
            Invalid::EmptyPath("pmem0: path".to_owned()),
        ),
        (
            "disk = [\"path=\"]",
            Invalid::EmptyPath("disk0: path".to_owned()),
        ),
    ] {
        assert_eq!(resolve(text).unwrap_err(), wanted, "{text}");
    }
    let many = format!("disk = [{}]", "\"a\",".repeat(25));
    assert_eq!(
        resolve(&many).unwrap_err(),
        Invalid::NoSlot("disk24".to_owned())
    );
    for text in [
        "disk = [\"a,socket=b\"]",
        "disk = [\"socket=b,readonly\"]",
        "disk = [\"socket=b,binary=c\"]",
        "console = \"pty,file=a\"",
        "console = \"stdio,socket=a\"",
        "console = \"file=\"",
        "serial = \"file=a,unix=b\"",
        "accel = \"kvm,socket=a\"",
        "accel = \"soft,socket=a\"",
        "rng = \"rate=0\"",
        "net = [\"mac-filter=on\"]",
        "net = [\"user,tap=tap0\"]",
        "net = [\"user,queues=2\"]",
        "net = [\"tap=tap0,forward=tcp:1-1\"]",
        "net = [\"tap=tap0,host-loopback\"]",
        "net = [\"tap=tap0,passt=/bin/passt\"]",
        "net = [\"tap=tap0,binary=\"]",
        "net = [\"user,rx-rate=0\"]",
        "net = [\"user,tx-burst=1K\"]",
        "net = [\"user,slot=8\"]\ndisk = [\"a\"]",
        "rng = \"rate=1M,socket=a\"",
    ] {
        let error = resolve(text).unwrap_err().to_string();
        assert!(error.contains('`'), "{text}: {error}");
    }
    let long = format!("vsock = \"{}\"", "x".repeat(97));
    let error = resolve(&long).unwrap_err().to_string();
    assert!(error.contains("97 bytes, at most 96"), "{error}");
    assert_eq!(Config::default().resolve(), Err(Invalid::NoKernel));
}

#[test]
fn devices_of_any_type() {
    let vm = resolve(
        "vhost-user = [\"i2c,socket=/a\", \"type=50,socket=/b,queues=5,queue-size=64,\
         config-size=9,id=x,slot=4\"]",
    )
    .unwrap();
    let devices: Vec<_> = vm.devices[1..]
        .iter()
        .map(|device| {
            let kind = &device.kind;
            let queues = (device.queues, kind.queue_size());
            let numbers = (kind.device_type(), queues, kind.config_size());
            (device.id.as_str(), device.slot, numbers)
        })
        .collect();
    assert_eq!(
        devices,
        [
            ("vhost-user0", 28, (34, (1, 128), 0)),
            ("x", 4, (50, (5, 64), 9))
        ]
    );
    for (text, part) in [
        ("socket=/a", "`type` is missing"),
        ("i2c", "`socket` is missing"),
        ("50,socket=/a,config-size=1", "`queues` is missing"),
        ("50,socket=/a,queues=1", "`config-size` is missing"),
        ("i2c,socket=", "empty path"),
        ("i2c,socket=/a,queue-size=96", "96, which is not a power"),
        ("gpu,socket=/a", "needs `memory=shared`"),
        (
            "24,socket=/a,memory=bounce",
            "of type mem name guest memory",
        ),
    ] {
        let error = resolve(&format!("vhost-user = [\"{text}\"]")).unwrap_err();
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
    resolve("vhost-user = [\"gpu,socket=/a,memory=shared\"]").unwrap();
    for text in [
        "floppy,socket=/a",
        "0,socket=/a",
        "i2c,socket=/a,queues=127",
    ] {
        let error = parse(&format!("vhost-user = [\"{text}\"]")).unwrap_err();
        assert!(
            error.contains("expected") || error.contains("allowed"),
            "{error}"
        );
    }
}

/// The examples of the documentation are valid, and the complete one says everything.
#[test]
fn documentation() {
    let text = include_str!("../../../docs/configuration.md");
    let examples: Vec<_> = text
        .split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert_eq!(examples.len(), 2);
    for example in &examples {
        parse(example).unwrap().resolve().unwrap();
    }
    let config = parse(examples[0]).unwrap();
    // Every key of the file has been given: none is filled in.
    let given: toml::Table = toml::from_str(examples[0]).unwrap();
    let effective = toml::Table::try_from(config.resolve().unwrap().config).unwrap();
    for key in effective.keys() {
        assert!(given.contains_key(key), "the example lacks {key}");
    }
    // Every key of every table is explained.
    for table in [
        unknown_key::<Cgroup>(),
        unknown_key::<Disk>(),
        unknown_key::<Console>(),
        unknown_key::<Serial>(),
        unknown_key::<Rng>(),
        unknown_key::<Balloon>(),
        unknown_key::<Pmem>(),
        unknown_key::<PanicDevice>(),
        unknown_key::<Vsock>(),
        unknown_key::<Cpus>(),
        unknown_key::<Restart>(),
        unknown_key::<VhostUser>(),
        unknown_key::<Net>(),
    ] {
        for key in table.split('`').skip(3).step_by(2) {
            assert!(text.contains(&format!("`{key}`")), "{key} is not explained");
        }
    }
}

/// The message about an unknown key, which names all known ones.
fn unknown_key<T: Short>() -> String {
    match T::from_text("no-such-key=1") {
        Err(error) => error.to_string(),
        Ok(_) => panic!("every key is accepted"),
    }
}

#[test]
fn shares_have_tags_and_maps() {
    let vm = resolve(
        "[[fs]]\ntag = \"src\"\npath = \"/srv\"\nuid-map = \"0:1000:1+1:100000:65536\"\n\
         queues = 3\ncache = \"always\"\nowner = \"guest\"\n[[fs]]\ntag = \"b\"\nsocket = \"s\"",
    )
    .expect("a machine");
    let devices: Vec<_> = vm
        .devices
        .iter()
        .filter(|device| matches!(device.kind, Kind::Fs(_)))
        .map(|device| (device.id.to_string(), device.slot, device.queues))
        .collect();
    assert_eq!(
        devices,
        [("fs0".to_owned(), 20, 4), ("fs1".to_owned(), 21, 2)]
    );
    let config = vm.devices.iter().find_map(|device| device.kind.config());
    let config = config.expect("the configuration space of a share");
    assert_eq!(
        (config.len(), &config[..4], &config[36..]),
        (40, &b"src\0"[..], &[3, 0, 0, 0][..])
    );
    for (keys, part) in [
        ("tag=", "1 to 36 bytes"),
        ("tag=a,cache=some", "`none`, `auto`, `always`"),
        ("tag=a,owner=me", "`self`, `guest`"),
        ("tag=a,queues=17", "1 to 16"),
        ("tag=a,uid-map=0:1", "GUEST:HOST:COUNT"),
        ("tag=a,uid-map=0:0:0", "GUEST:HOST:COUNT"),
        ("tag=a,gid-map=0:0:2+1:9:1", "no two overlap"),
        ("tag=a,gid-map=0:4294967295:1", "GUEST:HOST:COUNT"),
    ] {
        let error = parse(&format!("fs = [\"{keys}\"]")).expect_err(keys);
        assert!(error.contains(part), "{keys}: {error}");
    }
    let long = format!("fs = [\"tag={}\"]", "x".repeat(37));
    assert!(
        parse(&long)
            .expect_err("37 bytes")
            .contains("1 to 36 bytes")
    );
}

#[test]
fn a_control_group_and_its_limits() {
    let vm = |text: &str| {
        let config = parse(&format!("kernel = '/k'\n{text}"));
        let vm = config.and_then(|config| config.resolve().map_err(|e| e.to_string()));
        vm.map(|vm| vm.config.cgroup)
    };
    let default = vm("").unwrap();
    assert_eq!(default.place(), CgroupPlace::Auto);
    assert!(!default.has_limits());
    let off = vm("cgroup = 'off'").unwrap();
    assert_eq!(off.place(), CgroupPlace::Off);
    let named = vm("cgroup = '/sys/fs/cgroup/vms,memory-max=2G,cpu-max=250'").unwrap();
    let path = Path::new("/sys/fs/cgroup/vms");
    assert_eq!(named.place(), CgroupPlace::Path(path));
    assert!(named.has_limits());
    assert_eq!(named.memory_max, Some(Size(2 << 30)));
    assert_eq!(named.cpu_max.map(|percent| percent.get()), Some(250));
    let table = vm("[cgroup]\npath = 'auto'\npids-max = 300\ndevice-memory-max = '64M'").unwrap();
    assert_eq!(table.place(), CgroupPlace::Auto);
    assert!(table.has_limits());
    for (text, part) in [
        ("cgroup = 'vms'", "allowed: auto, off or an absolute path"),
        (
            "cgroup = 'off,pids-max=3'",
            "has no meaning without a control group",
        ),
        ("cgroup = 'cpu-max=0'", "a whole number from 1 to 6400"),
        ("cgroup = 'memory-max=much'", "a size such as"),
    ] {
        let error = vm(text).unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
}
