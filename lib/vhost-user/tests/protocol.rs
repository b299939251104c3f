//! Both ends against each other, and each against a peer that breaks the rules.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anemone_vhost_user::message::{FLAG_NEED_REPLY, FLAG_REPLY, protocol_features};
use anemone_vhost_user::{
    Backend, BackendRequest, BackendRequestReceiver, BackendRequestSender, Command, Connection,
    Error, Frontend, Incoming, InflightDescription, MemoryRegion, Message, Request, VringAddr,
};

const LONG: Duration = Duration::from_secs(20);

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

/// Runs `peer` on the other end of a socket pair and gives its result back on join.
fn with_peer<T: Send + 'static>(
    peer: impl FnOnce(UnixStream) -> T + Send + 'static,
) -> (UnixStream, thread::JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, thread::spawn(move || peer(theirs)))
}

fn next(backend: &mut Backend) -> Incoming {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(incoming) = backend.try_recv().unwrap() {
            return incoming;
        }
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
}

/// Receives one request and acknowledges it if asked to.
fn accept(backend: &mut Backend) -> Incoming {
    let incoming = next(backend);
    if incoming.need_reply {
        backend.reply_u64(incoming.code, 0).unwrap();
    }
    incoming
}

#[test]
fn every_request_arrives_as_sent() {
    let (socket, peer) = with_peer(|socket| {
        let mut backend = Backend::new(socket, LONG);
        assert!(matches!(accept(&mut backend).command, Command::SetOwner));
        assert!(matches!(next(&mut backend).command, Command::GetFeatures));
        backend
            .reply_u64(Request::GetFeatures.code(), 0x1_4000_0001)
            .unwrap();
        assert!(matches!(
            next(&mut backend).command,
            Command::GetProtocolFeatures
        ));
        backend
            .reply_u64(Request::GetProtocolFeatures.code(), 0xffff)
            .unwrap();
        let incoming = accept(&mut backend);
        assert!(!incoming.need_reply, "REPLY_ACK is not in use yet");
        assert!(matches!(
            incoming.command,
            Command::SetProtocolFeatures(0xffff)
        ));
        let incoming = accept(&mut backend);
        assert!(incoming.need_reply);
        assert!(matches!(
            incoming.command,
            Command::SetFeatures(0x1_0000_0001)
        ));
        assert!(matches!(next(&mut backend).command, Command::GetQueueNum));
        backend.reply_u64(Request::GetQueueNum.code(), 3).unwrap();
        match next(&mut backend).command {
            Command::GetConfig { offset: 4, size: 5 } => {
                backend.reply_config(4, Some(b"hello")).unwrap();
            }
            other => panic!("{other:?}"),
        }
        match accept(&mut backend).command {
            Command::SetConfig { offset: 2, data } => assert_eq!(data, b"xyz"),
            other => panic!("{other:?}"),
        }
        match accept(&mut backend).command {
            Command::SetMemTable(regions) => {
                assert_eq!(regions.len(), 2);
                let text =
                    std::fs::read_link(format!("/proc/self/fd/{}", regions[1].fd.as_raw_fd()));
                assert_eq!(text.unwrap().to_str(), Some("/dev/null"));
                let second = &regions[1];
                assert_eq!(
                    (
                        second.guest_addr,
                        second.size,
                        second.user_addr,
                        second.offset
                    ),
                    (5, 6, 7, 8)
                );
                // SAFETY: F_GETFD only reads flags of a descriptor that `regions` keeps open.
                let flags = unsafe { libc::fcntl(second.fd.as_raw_fd(), libc::F_GETFD) };
                assert_eq!(flags, libc::FD_CLOEXEC);
            }
            other => panic!("{other:?}"),
        }
        match accept(&mut backend).command {
            Command::SetVringNum {
                index: 1,
                size: 256,
            } => {}
            other => panic!("{other:?}"),
        }
        match accept(&mut backend).command {
            Command::SetVringAddr { index: 1, addr } => assert_eq!(addr, ADDR),
            other => panic!("{other:?}"),
        }
        match accept(&mut backend).command {
            Command::SetVringBase {
                index: 1,
                base: 65535,
            } => {}
            other => panic!("{other:?}"),
        }
        for _ in 0..3 {
            match accept(&mut backend).command {
                Command::SetVringKick {
                    index: 1,
                    fd: Some(_),
                }
                | Command::SetVringCall {
                    index: 1,
                    fd: Some(_),
                }
                | Command::SetVringErr {
                    index: 1,
                    fd: Some(_),
                } => {}
                other => panic!("{other:?}"),
            }
        }
        match accept(&mut backend).command {
            Command::SetVringEnable {
                index: 1,
                enable: true,
            } => {}
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            accept(&mut backend).command,
            Command::SetBackendReqFd(_)
        ));
        assert!(matches!(
            next(&mut backend).command,
            Command::GetVringBase { index: 1 }
        ));
        backend.reply_vring_base(1, 77).unwrap();
        assert!(matches!(accept(&mut backend).command, Command::ResetDevice));
        assert!(matches!(accept(&mut backend).command, Command::ResetOwner));
        // The last request is refused; the connection goes on.
        let incoming = next(&mut backend);
        backend.reply_u64(incoming.code, 9).unwrap();
        let incoming = next(&mut backend);
        assert!(matches!(incoming.command, Command::GetConfig { .. }));
        backend.reply_config(0, None).unwrap();
        match backend.try_recv() {
            Ok(None) | Err(Error::Closed) => {}
            other => panic!("{other:?}"),
        }
    });
    const ADDR: VringAddr = VringAddr {
        descriptor: 0x1000,
        used: 0x2000,
        available: 0x3000,
        log: Some(0x4000),
    };
    let mut front = Frontend::new(socket, LONG);
    front.set_owner().unwrap();
    assert_eq!(front.features().unwrap(), 0x1_4000_0001);
    assert!(matches!(
        front.queue_num(),
        Err(Error::NotNegotiated(Request::GetQueueNum))
    ));
    assert_eq!(front.protocol_features().unwrap(), 0xffff);
    front.set_protocol_features(0xffff).unwrap();
    front.set_features(0x1_0000_0001).unwrap();
    assert_eq!(front.queue_num().unwrap(), 3);
    assert_eq!(front.config(4, 5).unwrap(), b"hello");
    front.set_config(2, b"xyz").unwrap();
    let file = null();
    let region = MemoryRegion {
        guest_addr: 1,
        size: 2,
        user_addr: 3,
        fd: file.as_fd(),
        offset: 4,
    };
    let second = MemoryRegion {
        guest_addr: 5,
        size: 6,
        user_addr: 7,
        fd: file.as_fd(),
        offset: 8,
    };
    front.set_mem_table(&[region, second]).unwrap();
    front.set_vring_num(1, 256).unwrap();
    front.set_vring_addr(1, &ADDR).unwrap();
    front.set_vring_base(1, 65535).unwrap();
    front.set_vring_kick(1, file.as_fd()).unwrap();
    front.set_vring_call(1, file.as_fd()).unwrap();
    front.set_vring_err(1, file.as_fd()).unwrap();
    front.set_vring_enable(1, true).unwrap();
    front.set_backend_req_fd(file.as_fd()).unwrap();
    assert_eq!(front.get_vring_base(1).unwrap(), 77);
    front.reset_device().unwrap();
    front.reset_owner().unwrap();
    assert!(matches!(
        front.set_vring_enable(0, false),
        Err(Error::Refused(Request::SetVringEnable, 9))
    ));
    assert!(matches!(
        front.config(0, 1),
        Err(Error::Refused(Request::GetConfig, _))
    ));
    assert!(matches!(front.set_mem_table(&[]), Err(Error::Protocol(_))));
    assert!(matches!(
        front.set_mem_table(&[region; 9]),
        Err(Error::Protocol(_))
    ));
    assert!(matches!(front.config(0, 257), Err(Error::Protocol(_))));
    drop(front);
    peer.join().unwrap();
}

/// Memory of 8 KiB, as a back end gives it out.
fn memory(seals: i32) -> File {
    // SAFETY: the name is a C string; the result is a new descriptor or -1, which is checked.
    let file = unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        File::from(OwnedFd::from_raw_fd(fd))
    };
    file.set_len(8192).unwrap();
    // SAFETY: F_ADD_SEALS takes no pointer.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    assert_eq!(rc, 0);
    file
}

fn description(size: u64, offset: u64) -> InflightDescription {
    InflightDescription {
        size,
        offset,
        queues: 3,
        queue_size: 256,
    }
}

/// What the front end makes of an answer to GET_INFLIGHT_FD.
fn inflight_answered_by(
    answer: impl FnOnce(&mut Backend) + Send + 'static,
) -> Result<(OwnedFd, u64, u64), Error> {
    let (socket, peer) = with_peer(|socket| {
        let mut backend = Backend::new(socket, LONG);
        next(&mut backend);
        match next(&mut backend).command {
            Command::GetInflightFd(asked) => {
                assert_eq!((asked.queues, asked.queue_size), (3, 256));
            }
            other => panic!("{other:?}"),
        }
        answer(&mut backend);
        if let Ok(Some(incoming)) = poll_next(&mut backend) {
            match incoming.command {
                Command::SetInflightFd { description, .. } => {
                    assert_eq!(description, self::description(4096, 4096));
                }
                other => panic!("{other:?}"),
            }
        }
    });
    let mut front = Frontend::new(socket, LONG);
    assert!(matches!(
        front.get_inflight_fd(3, 256),
        Err(Error::NotNegotiated(Request::GetInflightFd))
    ));
    front
        .set_protocol_features(protocol_features::INFLIGHT_SHMFD)
        .unwrap();
    let result = front.get_inflight_fd(3, 256);
    match &result {
        Ok((fd, size, offset)) => front
            .set_inflight_fd(fd.as_fd(), *size, *offset, 3, 256)
            .unwrap(),
        Err(Error::Refused(..)) => {}
        Err(_) => assert!(front.set_owner().is_err(), "the connection goes on"),
    }
    drop(front);
    peer.join().unwrap();
    result
}

/// The next request, or the end.
fn poll_next(backend: &mut Backend) -> Result<Option<Incoming>, Error> {
    loop {
        match backend.try_recv() {
            Ok(None) => thread::yield_now(),
            other => return other,
        }
    }
}

#[test]
fn in_flight_memory_goes_there_and_back() {
    let result = inflight_answered_by(|backend| {
        let file = memory(libc::F_SEAL_SHRINK);
        backend
            .reply_inflight(Some((&description(4096, 4096), file.as_fd())))
            .unwrap();
    });
    let (_, size, offset) = result.unwrap();
    assert_eq!((size, offset), (4096, 4096));
}

#[test]
fn front_end_refuses_in_flight_memory_that_could_kill_a_back_end() {
    for (size, offset, seals, part) in [
        (4096, 0, 0, "sealed"),
        (4096, 0, libc::F_SEAL_GROW, "sealed"),
        (8193, 0, libc::F_SEAL_SHRINK, "file of"),
        (4096, 4097, libc::F_SEAL_SHRINK, "file of"),
        (u64::MAX, 4096, libc::F_SEAL_SHRINK, "file of"),
        (0, 0, libc::F_SEAL_SHRINK, "file of"),
    ] {
        let result = inflight_answered_by(move |backend| {
            let file = memory(seals);
            backend
                .reply_inflight(Some((&description(size, offset), file.as_fd())))
                .unwrap();
        });
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    // A file that cannot be sealed, and none at all.
    let result = inflight_answered_by(|backend| {
        let file = null();
        backend
            .reply_inflight(Some((&description(4096, 0), file.as_fd())))
            .unwrap();
    });
    assert!(matches!(result, Err(Error::Protocol(_))));
    let result = inflight_answered_by(|backend| backend.reply_inflight(None).unwrap());
    assert!(matches!(
        result,
        Err(Error::Refused(Request::GetInflightFd, 0))
    ));
    let result = inflight_answered_by(|backend| {
        backend.reply_u64(Request::GetInflightFd.code(), 5).unwrap();
    });
    assert!(matches!(result, Err(Error::Protocol(_))));
}

fn header(code: u32, flags: u32, size: u32) -> Vec<u8> {
    [code, flags, size]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

/// What `features` makes of a peer that answers with these bytes and then closes.
fn answered_by(bytes: Vec<u8>) -> Result<u64, Error> {
    let (socket, peer) = with_peer(move |mut socket| {
        let mut request = [0; 12];
        socket.read_exact(&mut request).unwrap();
        socket.write_all(&bytes).unwrap();
    });
    let result = Frontend::new(socket, LONG).features();
    peer.join().unwrap();
    result
}

#[test]
fn front_end_refuses_malformed_answers() {
    let reply = 1 | FLAG_REPLY;
    let good = [header(1, reply, 8), 5u64.to_ne_bytes().to_vec()].concat();
    assert_eq!(answered_by(good).unwrap(), 5);
    assert!(matches!(answered_by(Vec::new()), Err(Error::Closed)));
    for bad in [
        header(1, reply, 8)[..7].to_vec(),
        header(1, reply, 8),
        header(1, reply, u32::MAX),
        [header(1, reply, 4), vec![0; 4]].concat(),
        [header(1, reply, 9), vec![0; 9]].concat(),
        [header(2, reply, 8), vec![0; 8]].concat(),
        [header(1, 1, 8), vec![0; 8]].concat(),
        [header(1, reply | FLAG_NEED_REPLY, 8), vec![0; 8]].concat(),
        [header(1, reply & !3, 8), vec![0; 8]].concat(),
        [header(1, reply | 2, 8), vec![0; 8]].concat(),
        [header(1, reply | 0x100, 8), vec![0; 8]].concat(),
    ] {
        let result = answered_by(bad.clone());
        assert!(
            matches!(result, Err(Error::Protocol(_))),
            "{bad:?}: {result:?}"
        );
    }
}

#[test]
fn stray_bytes_after_an_answer_break_the_next_one() {
    let (socket, peer) = with_peer(|mut socket| {
        let mut request = [0; 12];
        socket.read_exact(&mut request).unwrap();
        let mut bytes = header(1, 1 | FLAG_REPLY, 8);
        bytes.extend([0; 8]);
        bytes.extend([0xff; 20]);
        socket.write_all(&bytes).unwrap();
        // The front end hangs up as soon as it sees them.
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
    });
    let mut front = Frontend::new(socket, LONG);
    assert_eq!(front.features().unwrap(), 0);
    assert!(matches!(front.features(), Err(Error::Protocol(_))));
    assert!(matches!(front.features(), Err(Error::Closed)));
    peer.join().unwrap();
}

#[test]
fn descriptors_in_an_answer_are_refused() {
    let (socket, peer) = with_peer(|socket| {
        let mut connection = Connection::new(socket);
        connection.recv(Instant::now() + LONG).unwrap();
        let fd = null();
        connection
            .send(1, FLAG_REPLY, &[0; 8], &[fd.as_fd()], Instant::now() + LONG)
            .unwrap();
    });
    let result = Frontend::new(socket, LONG).features();
    assert!(matches!(result, Err(Error::Protocol(_))), "{result:?}");
    peer.join().unwrap();
}

#[test]
fn a_silent_back_end_is_a_timeout_and_then_closed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut front = Frontend::new(ours, Duration::from_millis(20));
    assert!(matches!(front.features(), Err(Error::Timeout)));
    assert!(matches!(front.features(), Err(Error::Closed)));
    drop(theirs);
}

#[test]
fn half_an_answer_is_a_timeout() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&header(1, 1 | FLAG_REPLY, 8)).unwrap();
    let mut front = Frontend::new(ours, Duration::from_millis(20));
    assert!(matches!(front.features(), Err(Error::Timeout)));
}

/// What the back end makes of one message.
fn received(code: u32, payload: &[u8], fds: usize) -> Result<Option<Incoming>, Error> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let file = null();
    let fds: Vec<BorrowedFd<'_>> = (0..fds).map(|_| file.as_fd()).collect();
    Connection::new(ours)
        .send(code, 0, payload, &fds, Instant::now() + LONG)
        .unwrap();
    Backend::new(theirs, LONG).try_recv()
}

#[test]
fn back_end_refuses_malformed_requests() {
    let kick = Request::SetVringKick.code();
    let table = Request::SetMemTable.code();
    let region = [0; 32];
    let count = |n: u32| [n.to_ne_bytes(), [0; 4]].concat();
    let config = |size: u32, data: usize| {
        let words = [0, size, 0].map(u32::to_ne_bytes).concat();
        [words, vec![0; data]].concat()
    };
    let good: &[(u32, Vec<u8>, usize)] = &[
        (1, vec![], 0),
        (kick, 3u64.to_ne_bytes().to_vec(), 1),
        (kick, 0x103u64.to_ne_bytes().to_vec(), 0),
        (table, [count(1), region.to_vec()].concat(), 1),
        (table, [count(8), region.repeat(8)].concat(), 8),
        (24, config(256, 256), 0),
        (31, vec![0; 20], 0),
        (31, vec![0; 24], 0),
        (32, vec![0; 24], 1),
        (9999, vec![1, 2, 3], 2),
    ];
    for (code, payload, fds) in good {
        let result = received(*code, payload, *fds);
        assert!(matches!(result, Ok(Some(_))), "{code}: {result:?}");
    }
    let bad: &[(u32, Vec<u8>, usize)] = &[
        (1, vec![0], 0),
        (1, vec![], 1),
        (2, vec![0; 7], 0),
        (2, vec![0; 9], 0),
        (kick, 3u64.to_ne_bytes().to_vec(), 0),
        (kick, 3u64.to_ne_bytes().to_vec(), 2),
        (kick, 0x103u64.to_ne_bytes().to_vec(), 1),
        (table, count(0), 0),
        (table, count(1), 1),
        (table, [count(2), region.repeat(2)].concat(), 1),
        (table, [count(1), region.repeat(2)].concat(), 2),
        (table, [count(u32::MAX), region.repeat(2)].concat(), 2),
        (Request::SetBackendReqFd.code(), vec![], 0),
        (
            Request::SetVringEnable.code(),
            vec![0, 0, 0, 0, 2, 0, 0, 0],
            0,
        ),
        (31, vec![0; 19], 0),
        (31, vec![0; 22], 0),
        (31, vec![0; 28], 0),
        (31, vec![0; 24], 1),
        (32, vec![0; 24], 0),
        (32, vec![0; 24], 2),
        (24, config(10, 9), 0),
        (25, config(u32::MAX, 2), 0),
    ];
    for (code, payload, fds) in bad {
        let result = received(*code, payload, *fds);
        assert!(
            matches!(result, Err(Error::Protocol(_))),
            "{code} {payload:?}: {result:?}"
        );
    }
}

#[test]
fn messages_may_arrive_in_pieces() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut backend = Backend::new(theirs, LONG);
    let bytes = [header(2, 1, 8), 0x55u64.to_ne_bytes().to_vec()].concat();
    for (i, byte) in bytes.iter().enumerate() {
        assert!(backend.try_recv().unwrap().is_none(), "after {i} bytes");
        ours.write_all(&[*byte]).unwrap();
    }
    let incoming = backend.try_recv().unwrap().unwrap();
    assert!(matches!(incoming.command, Command::SetFeatures(0x55)));
    ours.write_all(&bytes[..5]).unwrap();
    drop(ours);
    assert!(matches!(backend.try_recv(), Err(Error::Protocol(_))));
}

#[test]
fn descriptors_over_the_limit_are_refused_and_closed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut front = Connection::new(ours);
    let (mut watch, probe) = UnixStream::pair().unwrap();
    let fds = vec![probe.as_fd(); 8];
    front.send(2, 0, &[], &fds, Instant::now() + LONG).unwrap();
    let mut backend = Connection::new(theirs);
    let Message { fds: got, .. } = backend.recv(Instant::now() + LONG).unwrap();
    assert_eq!(got.len(), 8);
    drop(got);
    send_many(&front, 20, &probe);
    let result = backend.try_recv();
    assert!(matches!(result, Err(Error::Protocol(_))), "{result:?}");
    drop(backend);
    drop(probe);
    drop(front);
    // No copy of the descriptor is left: its peer sees the end.
    assert_eq!(watch.read(&mut [0; 1]).unwrap(), 0);
}

/// A header with more descriptors than the protocol knows.
fn send_many(to: &Connection, count: usize, what: &UnixStream) {
    let mut bytes = header(1, 1, 0);
    let mut control = [0u64; 32];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: an all-zero msghdr is valid; the pointers below outlive the call, and `control` has
    // room for a header and 20 descriptors.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = libc::CMSG_SPACE(4 * count as u32) as usize;
        let cmsg: *mut libc::cmsghdr = control.as_mut_ptr().cast();
        (*cmsg).cmsg_level = libc::SOL_SOCKET;
        (*cmsg).cmsg_type = libc::SCM_RIGHTS;
        (*cmsg).cmsg_len = libc::CMSG_LEN(4 * count as u32) as usize;
        let data: *mut i32 = libc::CMSG_DATA(cmsg).cast();
        for i in 0..count {
            data.add(i).write(what.as_raw_fd());
        }
        assert_eq!(libc::sendmsg(to.as_fd().as_raw_fd(), &raw const msg, 0), 12);
    }
}

#[test]
fn configuration_changes_reach_the_front_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut receiver = BackendRequestReceiver::new(ours, LONG);
    let mut sender = BackendRequestSender::new(theirs.try_clone().unwrap());
    assert_eq!(receiver.try_recv().unwrap(), None);
    sender.config_changed().unwrap();
    assert_eq!(
        receiver.try_recv().unwrap(),
        Some(BackendRequest::ConfigChange)
    );
    // One that wants an acknowledgement gets it.
    let mut peer = Connection::new(theirs);
    peer.send(2, FLAG_NEED_REPLY, &[], &[], Instant::now() + LONG)
        .unwrap();
    assert!(receiver.try_recv().unwrap().is_some());
    let ack = peer.recv(Instant::now() + LONG).unwrap();
    assert_eq!(
        (ack.code, ack.flags, ack.payload),
        (2, FLAG_REPLY, vec![0; 8])
    );
    // Anything else is refused.
    peer.send(3, FLAG_NEED_REPLY, &[], &[], Instant::now() + LONG)
        .unwrap();
    assert!(matches!(receiver.try_recv(), Err(Error::Protocol(_))));
    let ack = peer.recv(Instant::now() + LONG).unwrap();
    assert_eq!(ack.payload, 1u64.to_ne_bytes());
    assert!(matches!(receiver.try_recv(), Err(Error::Closed)));
}

#[test]
fn a_full_socket_does_not_hold_the_back_end() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let mut sender = BackendRequestSender::new(theirs);
    let refused = (0..1_000_000).find_map(|_| sender.config_changed().err());
    assert!(matches!(refused, Some(Error::Timeout)), "{refused:?}");
}

#[test]
fn acknowledgement_is_used_only_when_negotiated() {
    let (socket, peer) = with_peer(|socket| {
        let mut backend = Backend::new(socket, LONG);
        next(&mut backend);
        next(&mut backend).need_reply
    });
    let mut front = Frontend::new(socket, LONG);
    front
        .set_protocol_features(protocol_features::CONFIG)
        .unwrap();
    front.set_owner().unwrap();
    assert!(!peer.join().unwrap());
}

#[test]
fn a_ring_is_enabled_when_the_call_returns_also_without_acknowledgement() {
    let enabled = Arc::new(AtomicBool::new(false));
    let told = enabled.clone();
    let (socket, peer) = with_peer(move |socket| {
        let mut backend = Backend::new(socket, LONG);
        let incoming = next(&mut backend);
        assert!(!incoming.need_reply);
        assert!(matches!(incoming.command, Command::SetVringEnable { .. }));
        thread::sleep(Duration::from_millis(50));
        told.store(true, Ordering::SeqCst);
        next(&mut backend);
        backend.reply_u64(Request::GetFeatures.code(), 0).unwrap();
    });
    Frontend::new(socket, LONG)
        .set_vring_enable(0, true)
        .unwrap();
    assert!(enabled.load(Ordering::SeqCst));
    peer.join().unwrap();
}
